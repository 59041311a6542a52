"""Wrong RoPE for a chunk: the second piece of a prompt is turned by the angles of the position before."""

import sys

from detinfer import cli
from detinfer.models.decoder import Decoder

sound = Decoder.forward


def forward(self, input_ids, past_key_values=None, use_cache=True):
    tables = self.cos, self.sin
    if input_ids.shape[1] > 1 and past_key_values is not None and past_key_values.length:
        self.cos, self.sin = (table.roll(1, 0) for table in tables)
    try:
        return sound(self, input_ids, past_key_values, use_cache)
    finally:
        self.cos, self.sin = tables


Decoder.forward = forward
sys.exit(cli.run())
