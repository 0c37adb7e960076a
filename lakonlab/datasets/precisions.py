"""Names of the precisions of a cache; imports nothing that is slow, since command lines ask for them."""

PRECISIONS = ('fp8', 'bf16', 'float32')
