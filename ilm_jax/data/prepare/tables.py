"""Reads CSV, TSV, JSONL and Parquet files strictly: every complaint names the file and the line.

A lenient reader turns '007' into 7, an unclosed quote into one huge field and a short row into
missing values, and none of it shows before the metrics are wrong. Here ids stay as written, and
what is not right stops.
"""

import csv
import dataclasses
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from ilm_jax.errors import UsageError, did_you_mean

pc: Any = pyarrow.compute  # its functions are made at import: type checkers see none

KINDS = ('.csv', '.tsv', '.jsonl', '.csv.gz', '.tsv.gz', '.jsonl.gz', '.parquet')

_NUMBER = r'^\s*-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$'
_INTEGER = r'^\s*-?\d+\s*$'
_DATE = r'^\s*\d{4}-\d\d'  # pandas alone would also take 'today'
_MICROSECONDS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Table:
  """Columns of one file.

  Attributes:
    path: the file.
    kind: its kind, one of `KINDS`.
    columns: column name -> n values: an Arrow array (strings, or Parquet's own types), or for
      JSONL a list of str (numbers too, as written), None, bool, list or dict.
  """

  path: Path
  kind: str
  columns: Mapping[str, Any]

  def where(self, row: int) -> str:
    """Returns 'FILE, line N' of a 0-based row, both counted from 1 ('FILE, row N' in Parquet)."""
    if self.kind == '.parquet':
      return f'{self.path}, row {row + 1}'
    if self.kind.startswith('.jsonl'):
      lines = (number for number, text in read_lines(self.path) if text.strip())
    else:
      lines = (number for number, _ in _csv_rows(self.path, self.kind))
      next(lines)  # the header
    return f'{self.path}, line {next(line for at, line in enumerate(lines) if at == row)}'


def existing_file(path: str | os.PathLike[str], option: str) -> Path:
  """Returns `path`, or raises UsageError naming the option that gave it."""
  path = Path(path).expanduser()
  if not path.is_file():
    problem = 'is a directory, a file is expected' if path.is_dir() else 'no such file'
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UsageError(f'{option}={str(path)!r}: {problem}.{did_you_mean(path.name, siblings)}')
  return path


def read_lines(path: Path, encoding: str = 'utf-8') -> Iterator[tuple[int, str]]:
  """Yields (line number from 1, line without its end) of a text file, decompressing '.gz'.

  Raises:
    UsageError: the file cannot be read, is cut off, or has a line that is not in `encoding`.
  """
  number = 0
  try:
    with _open(path) as f:
      for number, line in enumerate(f, 1):
        text = line.decode(encoding)
        yield number, text.removeprefix('\ufeff').rstrip('\r\n')
  except UnicodeDecodeError as error:
    raise UsageError(f'{path}, line {number}: not {encoding.upper()}: {error}.') from error
  except (OSError, EOFError, zlib.error) as error:
    raise UsageError(f'{path}: cannot be read after line {number}: {error}.') from error


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line number from 1, object) of a JSONL file; blank lines are passed over.

  Numbers arrive as the strings that the file has: an id 0012345678901234567890 or 1.10 is kept.
  """
  for number, text in read_lines(path):
    if not text.strip():
      continue
    try:
      value = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (json.JSONDecodeError, RecursionError) as error:
      raise UsageError(f'{path}, line {number}: not JSON: {error}.') from error
    if not isinstance(value, dict):
      raise UsageError(f'{path}, line {number}: a JSON object is expected, found {text[:60]!r}.')
    yield number, value


def read_table(
  path: str | os.PathLike[str], option: str, wanted: Mapping[str, str], others: bool = False
) -> Table:
  """Reads columns of a file; its kind is told by its name (see `KINDS`).

  CSV and TSV are UTF-8 with a header; a value that holds the separator, a quote or a line break is
  in double quotes, and quotes inside are doubled (as pandas and spreadsheets write them).

  Args:
    path: the file.
    option: the option that gave the path, for messages.
    wanted: option -> the column that it names; all must exist.
    others: read all other columns too.

  Raises:
    UsageError: the file is missing, empty, damaged or of another kind, or lacks a column.
  """
  path = existing_file(path, option)
  kinds = [kind for kind in KINDS if path.name.lower().endswith(kind)]
  if not kinds:
    raise UsageError(f'{option}={str(path)!r}: unknown kind of file; allowed: {", ".join(KINDS)}.')
  kind = kinds[0]
  if not path.stat().st_size:
    raise UsageError(f'{option}={str(path)!r}: the file is empty.')
  read = {'.parquet': _read_parquet, '.jsonl': _read_jsonl, '.jsonl.gz': _read_jsonl}
  table = Table(path, kind, read.get(kind, _read_csv)(path, kind, wanted, others))
  if not len(next(iter(table.columns.values()))):
    raise UsageError(f'{option}={str(path)!r}: the file has no rows.')
  return table


def ids(table: Table, column: str) -> np.ndarray:
  """Returns [n] str (object array; equal ids share one str): the ids of a column as written.

  Raises:
    UsageError: an id is missing or empty, or is neither a string nor an integer.
  """
  values = _strings(table, column, 'ids are strings or integers', pa.types.is_integer)
  empty = pc.equal(pc.utf8_trim_whitespace(pc.fill_null(values, '')), '')
  _refuse(table, empty, lambda row: f'column {column!r}: the id is empty')
  encoded = values.dictionary_encode().unify_dictionaries().combine_chunks()
  if isinstance(encoded, pa.ChunkedArray):  # older Arrow keeps one chunk wrapped
    encoded = encoded.chunk(0)
  return np.array(encoded.dictionary.to_pylist(), dtype=object)[encoded.indices.to_numpy()]


def numbers(table: Table, column: str) -> np.ndarray:
  """Returns [n] float32. Raises UsageError where a value is missing or not a finite number."""
  values = _strings(table, column, 'numbers are expected', _is_number)
  found = pc.match_substring_regex(pc.fill_null(values, ''), _NUMBER)
  _refuse(
    table,
    pc.invert(found),
    lambda row: f'column {column!r}: {values[row].as_py()!r} is not a finite number',
  )
  with np.errstate(over='ignore'):  # reported just below
    result = pc.cast(pc.utf8_trim_whitespace(values), pa.float64()).to_numpy().astype(np.float32)
  _refuse(
    table,
    pa.array(~np.isfinite(result)),
    lambda row: f'column {column!r}: {values[row].as_py()!r} is too large',
  )
  return result


def timestamps(table: Table, column: str) -> tuple[np.ndarray, str]:
  """Returns ([n] int64, the unit): integers as they are, dates as seconds since 1970, UTC.

  The first value tells what the column holds: numbers, or ISO-8601 dates ('2014-01-30',
  '2014-01-30T12:00:00+02:00'; UTC where no zone is given). Where a value has a fraction of a
  second, the whole column is in microseconds, so that no order is lost.

  Raises:
    UsageError: a value is missing, cannot be parsed, or is of the other sort than the first.
  """
  array = table.columns[column]
  if not isinstance(array, list) and pa.types.is_temporal(array.type):
    _refuse(table, array.is_null(), lambda row: f'column {column!r}: no timestamp')
    return _seconds(array.cast(pa.timestamp('us'), safe=False).cast(pa.int64()).to_numpy())
  values = pc.fill_null(_strings(table, column, 'numbers or dates are expected', _is_number), '')
  numeric = bool(pc.match_substring_regex(values[0], _NUMBER).as_py())
  first = f' ({table.where(0)}, has {values[0].as_py()!r})' if numeric else ''

  def refuse(bad: Any) -> None:
    expected = f'a number is expected{first}' if numeric else 'expected: 1391040000 or 2014-01-30'
    _refuse(table, bad, lambda row: f'column {column!r}: {values[row].as_py()!r}: {expected}')

  trimmed = pc.utf8_trim_whitespace(values)
  if not numeric:
    dates = pd.to_datetime(
      pd.Series(trimmed.to_pylist()), format='ISO8601', utc=True, errors='coerce'
    ).dt.as_unit('us')
    refuse(pc.or_(pa.array(dates.isna()), pc.invert(pc.match_substring_regex(values, _DATE))))
    return _seconds(dates.astype('int64').to_numpy())
  refuse(pc.invert(pc.match_substring_regex(values, _NUMBER)))
  if pc.all(pc.match_substring_regex(values, _INTEGER)).as_py():
    if pc.any(pc.greater(pc.utf8_length(trimmed), 18)).as_py():  # may not fit
      limit = np.iinfo(np.int64).max
      refuse(pa.array([abs(int(value)) > limit for value in trimmed.to_pylist()]))
    return trimmed.cast(pa.int64()).to_numpy(), 'as in the source'
  floats = trimmed.cast(pa.float64()).to_numpy()
  refuse(pa.array(~(np.abs(floats) < np.iinfo(np.int64).max / _MICROSECONDS)))
  if (floats == np.floor(floats)).all():
    return floats.astype(np.int64), 'as in the source'
  return np.round(floats * _MICROSECONDS).astype(np.int64), "microseconds, if the source's is 1 s"


def texts(table: Table, column: str) -> list[str]:
  """Returns n strings, '' for a missing one; a list of strings is joined with ', '.

  Raises:
    UsageError: a value is neither text, a number nor a list of those.
  """
  values = table.columns[column]
  result = []
  for row, value in enumerate(values if isinstance(values, list) else values.to_pylist()):
    parts = [p for p in (value if isinstance(value, list) else [value]) if not _is_missing(p)]
    if not all(map(_is_plain, parts)):
      raise UsageError(f'{table.where(row)}, column {column!r}: {value!r:.80} is not text.')
    result.append(', '.join(map(str, parts)))
  return result


def text_columns(table: Table) -> list[str]:
  """Returns the columns that hold text: strings, or lists of strings, not all of them numbers."""
  found = []
  for name, values in table.columns.items():
    if not isinstance(values, list):
      kind = values.type
      if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
      if not _is_string(kind):
        continue
      values = values.to_pylist()
    flat = [p for v in values for p in (v if isinstance(v, list) else [v]) if p not in (None, '')]
    if flat and all(isinstance(p, str) for p in flat):
      matches = pc.match_substring_regex(pa.array(flat, pa.string()), _NUMBER)
      if table.kind == '.parquet' or not pc.all(matches).as_py():
        found.append(name)
  return found


def shared_strings(values: np.ndarray) -> np.ndarray:
  """Returns [n] str as an object array in which equal values share one str: 8 bytes a row."""
  codes, unique = pd.factorize(values)
  return np.array([str(value) for value in unique], dtype=object)[codes]


def _open(path: Path) -> Any:
  return gzip.open(path, 'rb') if path.name.lower().endswith('.gz') else open(path, 'rb')


def _separator(kind: str) -> str:
  return '\t' if kind.startswith('.tsv') else ','


def _csv_rows(path: Path, kind: str) -> Iterator[tuple[int, list[str]]]:
  """Yields (first line of the row, fields), the header first, and refuses malformed rows."""
  limit = csv.field_size_limit(1 << 30)
  line, width = 1, None
  try:
    with io.TextIOWrapper(_open(path), 'utf-8-sig', newline='') as f:
      reader = csv.reader(f, delimiter=_separator(kind), strict=True)
      for fields in reader:
        if fields:
          width = width or len(fields)
          if len(fields) != width:
            raise UsageError(
              f'{path}, line {line}: {len(fields)} fields, the header has {width}. Put a value that'
              ' contains the separator in double quotes.'
            )
          yield line, fields
        line = reader.line_num + 1
  except csv.Error as error:
    raise UsageError(
      f'{path}, line {line}: {error}. Quotes around a value must be closed, and quotes inside it'
      ' doubled.'
    ) from error
  except UnicodeDecodeError:
    for _ in read_lines(path):  # stops at the line, with a message that names it
      pass
    raise
  except (OSError, EOFError, zlib.error) as error:
    raise UsageError(f'{path}: cannot be read after line {line}: {error}.') from error
  finally:
    csv.field_size_limit(limit)


def _read_csv(path: Path, kind: str, wanted: Mapping[str, str], others: bool) -> dict[str, Any]:
  names = next(_csv_rows(path, kind), (0, []))[1]
  chosen = _chosen(path, names, wanted, others)
  try:
    with _open(path) as f:
      quotes = any(b'"' in chunk for chunk in iter(lambda: f.read(1 << 22), b''))
    if quotes:  # Arrow takes an unclosed quote for a field that reaches to the end of the file
      for _ in _csv_rows(path, kind):
        pass
    with pa.input_stream(path, compression='detect') as f:
      table = pyarrow.csv.read_csv(
        f,
        parse_options=pyarrow.csv.ParseOptions(
          delimiter=_separator(kind), newlines_in_values=quotes
        ),
        convert_options=pyarrow.csv.ConvertOptions(
          column_types=dict.fromkeys(names, pa.string()),
          include_columns=chosen,
          null_values=[],
          strings_can_be_null=False,
        ),
      )
  except (pa.ArrowInvalid, OSError, EOFError, zlib.error) as error:
    for _ in _csv_rows(path, kind):  # names the line of a malformed row
      pass
    raise UsageError(f'{path}: {error}') from error
  return {name: table[name] for name in chosen}


def _read_jsonl(path: Path, kind: str, wanted: Mapping[str, str], others: bool) -> dict[str, Any]:
  del kind
  rows: list[dict[str, Any]] = []
  names: dict[str, None] = {}
  for _, row in read_json_lines(path):
    names.update(dict.fromkeys(row))
    rows.append(row if others else {name: row.get(name) for name in wanted.values()})
  chosen = _chosen(path, list(names), wanted, others)
  return {name: [row.get(name) for row in rows] for name in chosen}


def _read_parquet(path: Path, kind: str, wanted: Mapping[str, str], others: bool) -> dict[str, Any]:
  del kind
  try:
    file = pyarrow.parquet.ParquetFile(path)
    chosen = _chosen(path, file.schema_arrow.names, wanted, others)
    table = file.read(columns=chosen)
  except (pa.ArrowException, OSError) as error:
    raise UsageError(f'{path}: cannot be read as Parquet: {error}') from error
  return {name: table[name] for name in chosen}


def _chosen(path: Path, names: Sequence[str], wanted: Mapping[str, str], others: bool) -> list[str]:
  if len(set(names)) < len(names):
    twice = sorted({name for name in names if list(names).count(name) > 1})
    raise UsageError(f'{path}: more than one column is called {", ".join(map(repr, twice))}.')
  for option, column in wanted.items():
    if column not in names:
      raise UsageError(
        f'{option}={column!r}: {path} has no such column; it has {", ".join(map(repr, names))}.'
        + did_you_mean(column, names)
      )
  return list(dict.fromkeys([*wanted.values(), *(names if others else ())]))


def _strings(table: Table, column: str, expected: str, also: Callable[[Any], bool]) -> Any:
  """Returns a column as an Arrow array of strings; `also` tells other Arrow types that may pass."""
  values = table.columns[column]
  if isinstance(values, list):
    for row, value in enumerate(values):
      if value is not None and not isinstance(value, str):
        raise UsageError(f'{table.where(row)}, column {column!r}: {value!r:.80}; {expected}.')
    return pa.chunked_array([pa.array(values, pa.string())])
  kind = values.type
  if not (_is_string(kind) or also(kind)):
    raise UsageError(f'{table.path}, column {column!r}: its type is {kind}; {expected}.')
  return values.cast(pa.string())


def _is_string(kind: Any) -> bool:
  kind = kind.value_type if pa.types.is_dictionary(kind) else kind
  return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_number(kind: Any) -> bool:
  return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _is_missing(value: Any) -> bool:
  return value is None or value != value  # NaN


def _is_plain(value: Any) -> bool:
  return isinstance(value, str | int | float) and not isinstance(value, bool)


def _seconds(microseconds: np.ndarray) -> tuple[np.ndarray, str]:
  if (microseconds % _MICROSECONDS).any():
    return microseconds, 'microseconds since 1970, UTC'
  return microseconds // _MICROSECONDS, 'seconds since 1970, UTC'


def _refuse(table: Table, bad: Any, message: Callable[[int], str]) -> None:
  """Raises UsageError for the first row where `bad` holds."""
  row = pc.index(bad, True).as_py()
  if row >= 0:
    raise UsageError(f'{table.where(row)}, {message(row)}.')
