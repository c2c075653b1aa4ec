"""GGUF files written by the gguf package and read by us, against its own reader."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from ilm_jax.errors import UsageError
from ilm_jax.lm.gguf_files import GgufSource
from tests.support import tiny_gguf

METADATA = {
  '.block_count': 3,
  '.rms': 1e-5,
  '.flag': True,
  '.negative': [-1, 2, -3],
  '.scores': [0.5, -1000.0],
  '.texts': ['', 'ä b', '\n'],
  '.empty': 'nothing',
}


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  rng = np.random.default_rng(0)
  packed = {}
  for kind in (Type.Q4_K, Type.Q6_K):  # the package can read these, not write them
    size = gguf.GGML_QUANT_SIZES[kind][1]
    data = rng.integers(0, 256, (3, 2 * size), dtype=np.uint8)
    data[:, [1, 3, size - 1, size + 1, size + 3, 2 * size - 1]] = 0x2C  # scales that are finite
    packed[f'{kind.name}.weight'] = (data, kind)
  plain = {f'{kind.name}.weight': kind for kind in (Type.F32, Type.F16, Type.BF16)}
  blocks = {f'{kind.name}.weight': kind for kind in (Type.Q8_0, Type.Q4_1, Type.Q5_0)}
  tensors = {name: rng.normal(size=(5, 64)).astype(np.float32) for name in (plain | blocks)}
  tensors['one.weight'] = np.arange(3, dtype=np.float32)
  file = tmp_path_factory.mktemp('gguf') / 'model.gguf'
  return tiny_gguf.write_gguf(file, 'any', METADATA, tensors | packed, plain | blocks)


def test_equals_the_reader_of_the_package(path):
  source, reader = GgufSource(path), gguf.GGUFReader(path)
  for key, field in reader.fields.items():
    if not key.startswith('GGUF.'):
      found = source.metadata[key]
      found = np.float32(found) if isinstance(found, float) else np.asarray(found)
      np.testing.assert_array_equal(found, np.asarray(field.contents(), found.dtype))
  assert source.shapes.keys() == {tensor.name for tensor in reader.tensors}
  for tensor in reader.tensors:
    expected = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert source.shapes[tensor.name] == tuple(reversed(tensor.shape.tolist()))
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(
      source.read(tensor.name).astype(np.float32), expected.reshape(source.shapes[tensor.name])
    )


def test_values(path):
  source = GgufSource(path)
  assert source.where == str(path)
  assert source.key('any.rms') == 1e-5  # as written, not the float32 next to it
  assert source.key('any.texts') == METADATA['.texts']
  assert source.key('any.flag') is True
  assert source.key('any.none', 7) == 7
  with pytest.raises(UsageError, match=r"no 'any.block_coun'.*Did you mean 'any.block_count'"):
    source.key('any.block_coun')


def test_precision_of_what_was_written(path):
  """The tensors were one random draw each, in this order: rebuilt here without a GGUF file."""
  source, rng = GgufSource(path), np.random.default_rng(0)
  for kind in (Type.Q4_K, Type.Q6_K):
    rng.integers(0, 256, (3, 2 * gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
  dtypes = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
  steps = {'Q8_0': 127, 'Q4_1': 15, 'Q5_0': 16}
  for name in ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_1', 'Q5_0'):
    written = rng.normal(size=(5, 64)).astype(np.float32)
    read = source.read(f'{name}.weight')
    assert read.dtype == dtypes.get(name, np.float32)
    if name in dtypes:
      np.testing.assert_array_equal(read, written.astype(dtypes[name]))
    else:  # within a rounding, of a range of at most 2 max
      assert np.abs(read - written).max() <= 2 * np.abs(written).max() / steps[name]


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'not a GGUF file'),
    (b'\x80\x02}q', 'not a GGUF file'),
    (b'GGUF\x01\0\0\0' + bytes(99), r'GGUF version 1; allowed: versions 2 and 3'),
    (b'GGUF\0\0\0\x03' + bytes(99), 'big-endian'),
    (b'GGUF\x03\0\0\0', 'damaged or incomplete'),
  ],
)
def test_other_files(tmp_path, content, message):
  path = tmp_path / 'x.gguf'
  path.write_bytes(content)
  with pytest.raises(UsageError, match=message):
    GgufSource(path)


def test_no_file(tmp_path):
  with pytest.raises(UsageError, match='cannot be read'):
    GgufSource(tmp_path / 'none.gguf')
  with pytest.raises(UsageError, match='cannot be read'):
    GgufSource(tmp_path)


def test_every_incomplete_file_is_refused(path, tmp_path):
  whole, cut = path.read_bytes(), tmp_path / 'cut.gguf'
  header = whole.index(b'one.weight') + 100
  for size in [*range(8, header, 7), *range(header, len(whole) - 32, 997)]:
    cut.write_bytes(whole[:size])
    with pytest.raises(UsageError, match=r'(?i)incomplete'):
      GgufSource(cut)


def test_changed_bytes_are_refused_or_read(path, tmp_path):
  """Whatever stands there: no other exception, no endless loop, no memory."""
  whole, changed = path.read_bytes(), tmp_path / 'changed.gguf'
  rng = np.random.default_rng(0)
  refused = 0
  for _ in range(400):
    data = bytearray(whole)
    at = rng.integers(8, whole.index(b'one.weight') + 40)
    data[at] = rng.integers(256)
    changed.write_bytes(data)
    try:
      GgufSource(changed)
    except UsageError:
      refused += 1
  assert refused > 50


def test_unknown_type(path, tmp_path):
  data = bytearray(path.read_bytes())
  at = data.index(b'one.weight') + len(b'one.weight') + 4 + 8
  assert data[at : at + 4] == b'\0\0\0\0'  # F32
  data[at] = 255
  (tmp_path / 'x.gguf').write_bytes(data)
  with pytest.raises(UsageError, match=r'one.weight is of type 255'):
    GgufSource(tmp_path / 'x.gguf')


def test_type_without_a_formula(path, tmp_path):
  data = np.zeros((2, gguf.GGML_QUANT_SIZES[Type.I32][1] * 4), np.uint8)
  file = tiny_gguf.write_gguf(tmp_path / 'x.gguf', 'any', {}, {'x': (data, Type.I32)})
  with pytest.raises(UsageError, match='x is of type I32, which cannot be dequantised'):
    GgufSource(file).read('x')


def test_part_of_a_model(tmp_path):
  file = tiny_gguf.write_gguf(tmp_path / 'x.gguf', 'any', {'split.count': 3}, {})
  with pytest.raises(UsageError, match=r'one of 3 files.*llama-gguf-split --merge'):
    GgufSource(file)
