# TensorFlow has no type stubs, and what pyright infers of its sources is wrong in places that we
# use (tf.RaggedTensor.from_row_lengths, tf.random.experimental): here it is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
