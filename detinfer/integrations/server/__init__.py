"""Whether a running server answers a request with the same bytes whatever else it is doing: ``detinfer verify URL``."""
