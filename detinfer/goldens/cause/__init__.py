"""From a row that differs to the first operation that made it so."""
