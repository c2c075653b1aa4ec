"""Reads GGUF files, llama.cpp's format: metadata and tensors, most of them quantised.

The layout is that of the GGUF specification, versions 2 and 3 (ggml, docs/gguf.md): a header with
the metadata and a list of tensors, then their bytes. Reading the header here takes a fraction of a
second where `gguf.GGUFReader` takes 8 s for Gemma's 262,144 tokens, and every length in it is
compared with the size of the file. The formulas of the quantised types are the `gguf` package's.
"""

import math
import mmap
import os
import struct
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as TensorType

from ilm_jax.errors import UsageError, did_you_mean

_MAGIC = b'GGUF'
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # where general.alignment does not say another
_MAX_DIMENSIONS = 4

# Codes of the types of metadata, in the order of the specification.
_SCALARS = {
  0: '<u1',
  1: '<i1',
  2: '<u2',
  3: '<i2',
  4: '<u4',
  5: '<i4',
  6: '<f4',
  7: '?',
  10: '<u8',
  11: '<i8',
  12: '<f8',
}
_STRING, _ARRAY = 8, 9

_PLAIN = {
  TensorType.F32: np.float32,
  TensorType.F16: np.float16,
  TensorType.BF16: ml_dtypes.bfloat16,
}


class _Tensor(NamedTuple):
  """Where a tensor is; `offset` from the beginning of the file, `size` in bytes."""

  type: TensorType
  shape: tuple[int, ...]
  offset: int
  size: int


class GgufSource:
  """The tensors of a GGUF file, each dequantised when it is read.

  Attributes:
    where: the file, for messages.
    shapes: name -> shape, rows first: matrices are [outputs, inputs].
    metadata: key -> number, bool, string; arrays are lists of strings or NumPy arrays.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Reads the header.

    Raises:
      UsageError: it is no GGUF file, or one that is damaged, incomplete, a part of a model, or has
        tensors of an unknown type.
    """
    self.where = str(path)
    self.metadata: dict[str, Any] = {}
    self._tensors: dict[str, _Tensor] = {}
    try:
      with open(path, 'rb') as f:
        self._check_magic(f.read(8))
        self._bytes = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
      raise UsageError(f'{path}: cannot be read: {error}.') from error
    try:
      self._read_header()
    except (struct.error, ValueError, OverflowError) as error:
      if isinstance(error, UsageError):
        raise
      raise UsageError(
        f'{path}: its GGUF header is damaged or incomplete ({error}). Fetch the file again.'
      ) from error
    self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
    if self.metadata.get('split.count', 1) > 1:
      raise UsageError(
        f'{path}: one of {self.metadata["split.count"]} files of a model. Merge them first:'
        ' llama-gguf-split --merge FIRST_FILE MERGED_FILE.'
      )

  def key(self, name: str, *default: Any) -> Any:
    """A value of the metadata. Without a default, UsageError where there is none."""
    if name not in self.metadata and not default:
      hint = did_you_mean(name, self.metadata)
      raise UsageError(f'{self.where}: no {name!r} in its metadata, which is needed.{hint}')
    return self.metadata.get(name, *default)

  def read(self, name: str) -> np.ndarray:
    """The tensor: float16 and bfloat16 ones as they are, all others as float32."""
    tensor = self._tensors[name]
    if tensor.type in _PLAIN:
      array = np.frombuffer(
        self._bytes, _PLAIN[tensor.type], math.prod(tensor.shape), tensor.offset
      )
      return array.reshape(tensor.shape)
    packed = np.frombuffer(self._bytes, np.uint8, tensor.size, tensor.offset)
    rows = packed.reshape(math.prod(tensor.shape[:-1]), -1)
    try:
      return gguf.dequantize(rows, tensor.type).reshape(tensor.shape)
    except NotImplementedError as error:
      raise UsageError(
        f'{self.where}: tensor {name} is of type {tensor.type.name}, which cannot be dequantised.'
        ' Give a file of another quantisation: Q8_0, Q4_K_M or F16.'
      ) from error

  def _check_magic(self, start: bytes) -> None:
    if start[:4] != _MAGIC:
      raise UsageError(f"{self.where}: not a GGUF file: it begins with {start[:4]!r}, not b'GGUF'.")
    version = int.from_bytes(start[4:], 'little')
    if version not in _VERSIONS:
      big_endian = int.from_bytes(start[4:], 'big') in _VERSIONS
      found = 'in big-endian byte order' if big_endian else f'version {version}'
      raise UsageError(
        f'{self.where}: GGUF {found}; allowed: versions 2 and 3, little-endian.'
        " Convert the model again with a current llama.cpp's convert_hf_to_gguf.py."
      )

  def _read_header(self) -> None:
    header = _Header(self._bytes)
    num_tensors, num_keys = header.unpack('QQ')
    for _ in range(num_keys):
      key = header.string()
      self.metadata[key] = header.value(*header.unpack('I'))
    infos = [header.tensor() for _ in range(num_tensors)]
    alignment = self.metadata.get('general.alignment', _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
      raise ValueError(f'general.alignment={alignment!r}')
    start = -(-header.position // alignment) * alignment
    for name, dimensions, code, offset in infos:
      self._tensors[name] = self._tensor(name, dimensions, code, start + offset)

  def _tensor(self, name: str, dimensions: tuple[int, ...], code: int, offset: int) -> _Tensor:
    try:
      kind = TensorType(code)
    except ValueError as error:
      raise UsageError(
        f'{self.where}: tensor {name} is of type {code}, which the installed gguf package does not'
        ' know. Upgrade it, or give a file of another quantisation.'
      ) from error
    if name in self._tensors:
      raise ValueError(f'two tensors {name}')
    shape = tuple(reversed(dimensions))  # the file has the fastest dimension first
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
      raise ValueError(f'{name} {list(shape)} in rows that are not multiples of {block}')
    size = math.prod(shape) // block * block_bytes
    if offset + size > len(self._bytes):
      raise UsageError(
        f'{self.where}: incomplete: {name} ends at byte {offset + size:,}, the file has'
        f' {len(self._bytes):,}. Fetch it again.'
      )
    return _Tensor(kind, shape, offset, size)


class _Header:
  """Reads values one after the other. Beyond the end: struct.error, ValueError."""

  def __init__(self, data: mmap.mmap):
    self._data = data
    self.position = 8  # after magic and version

  def unpack(self, kinds: str) -> tuple[int, ...]:
    values = struct.unpack_from(f'<{kinds}', self._data, self.position)
    self.position += struct.calcsize(f'<{kinds}')
    return values

  def string(self) -> str:
    (length,) = self.unpack('Q')
    start, self.position = self.position, self.position + length
    if self.position > len(self._data):
      raise ValueError(f'a text of {length} bytes at byte {start}')
    return self._data[start : self.position].decode()

  def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
    """Name, dimensions, type and offset of a tensor."""
    name = self.string()
    (number,) = self.unpack('I')
    if number > _MAX_DIMENSIONS:
      raise ValueError(f'{name} has {number} dimensions')
    dimensions = self.unpack('Q' * number)
    code, offset = self.unpack('IQ')
    return name, dimensions, code, offset

  def value(self, kind: int) -> Any:
    if kind == _STRING:
      return self.string()
    if kind == _ARRAY:
      return self._array(*self.unpack('IQ'))
    (number,) = self._numbers(kind, 1)
    # Of a float32, the number that was once written: 1e-05, not 9.99999975e-06.
    return float(str(number)) if number.dtype == np.float32 else number.item()

  def _array(self, kind: int, length: int) -> list[Any] | np.ndarray:
    if kind == _STRING:
      return [self.string() for _ in range(length)]
    return self._numbers(kind, length)

  def _numbers(self, kind: int, length: int) -> np.ndarray:
    if kind not in _SCALARS:
      raise ValueError(f'a value of type {kind}')
    numbers = np.frombuffer(self._data, _SCALARS[kind], length, self.position)
    self.position += numbers.nbytes
    return numbers
