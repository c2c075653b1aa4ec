"""OpenP5's sequence files, with and without item text."""

import gzip
import json

import pytest

from ilm_jax.errors import UsageError
from ilm_jax.tasks.openp5 import openp5


@pytest.fixture
def sequences(tmp_path):
  path = tmp_path / 'user_sequence.txt'
  path.write_text('A1 30 10 20\nB2 10 40\n\nC3 07 10 10\n')
  return path


@pytest.fixture
def items(tmp_path):
  rows = [('10', 'Ten', ['a', 'b']), ('20', 'Twenty', []), ('30', 'Thirty', ['c'])]
  path = tmp_path / 'items.jsonl.gz'
  path.write_bytes(
    gzip.compress(
      '\n'.join(json.dumps({'item': int(i), 'title': t, 'tags': g}) for i, t, g in rows).encode()
    )
  )
  return path


def test_sequences_with_item_text(sequences, items):
  raw = openp5('shop', sequences, items)
  assert raw.users.tolist() == ['A1', 'A1', 'A1', 'B2', 'B2', 'C3', 'C3', 'C3']
  assert raw.items.tolist() == ['30', '10', '20', '10', '40', '07', '10', '10']
  assert raw.order == 'file'
  assert raw.timestamps is None
  assert raw.ratings is None
  assert raw.item_ids.tolist() == ['10', '20', '30']
  assert raw.item_text == {'title': ['Ten', 'Twenty', 'Thirty'], 'tags': ['a, b', '', 'c']}
  assert len(raw.provenance['files']) == 2


def test_titles_from_ids_must_be_asked_for(sequences, items):
  raw = openp5('shop', sequences, title_from_id=True)
  assert raw.item_ids.tolist() == ['30', '10', '20', '40', '07']
  assert raw.item_text == {'title': ['30', '10', '20', '40', '07']}
  with pytest.raises(UsageError, match='title_from_id=True'):
    openp5('shop', sequences)
  with pytest.raises(UsageError, match='not both'):
    openp5('shop', sequences, items, title_from_id=True)


def test_items_file_is_checked(sequences, tmp_path):
  path = tmp_path / 'items.tsv'
  path.write_text('id\ttitle\n10\tTen\n')
  with pytest.raises(UsageError, match=r"item='item'.*items.tsv.*'id', 'title'"):
    openp5('shop', sequences, path)
  assert openp5('shop', sequences, path, item='id').item_text == {'title': ['Ten']}
  path.write_text('item\ttitle\n10\tTen\n10\tDix\n')
  with pytest.raises(UsageError, match=r'line 3: item .10. is listed again'):
    openp5('shop', sequences, path)


@pytest.mark.parametrize(
  ('text', 'part'),
  [
    (b'', 'no user in it'),
    (b'\n \n', 'no user in it'),
    (b'A1 10\nB2\n', "line 2: user 'B2' has no items"),
    (b'A1 10\n\nB2 3\nA1 20\n', "line 4: user 'A1' is on line 1 already"),
    (b'A1 10\nB\xff 3\n', 'line 2: not UTF-8'),
  ],
)
def test_malformed_sequences(sequences, text, part):
  sequences.write_bytes(text)
  with pytest.raises(UsageError) as error:
    openp5('shop', sequences, title_from_id=True)
  assert part in str(error.value)
  assert 'user_sequence.txt' in str(error.value)


def test_missing_file(sequences):
  with pytest.raises(UsageError, match=r"sequences=.*Did you mean 'user_sequence.txt'"):
    openp5('shop', sequences.with_name('user_sequences.txt'), title_from_id=True)
