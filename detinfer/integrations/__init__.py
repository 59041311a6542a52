"""The policy and its checks inside other people's programs, through their own extension points."""
