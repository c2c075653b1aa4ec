"""Item-Language Models in JAX: items and users as soft tokens of a frozen language model.

Importing this package imports nothing heavy: no TensorFlow, no JAX, no gin.
"""

__version__ = '0.1.0'
