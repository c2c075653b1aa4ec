"""`ilm compile`: a training job compiled for a TPU topology, on a machine without a TPU."""

import json as json_module
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ilm_jax.aot import chips
from ilm_jax.config.plugins import import_task_modules
from ilm_jax.errors import UsageError


def compile(
  *,
  topology: str,
  train: dict[str, Any] | None = None,
  shapes: dict[str, int] | None = None,
  lm: str | None = None,
  programs: str | Sequence[str] = (),
  decode_rows: int | None = None,
  beam_size: int = 10,
  json: Path | None = None,
) -> dict[str, Any]:
  """Says what the programs of a training job need of a chip, and how fast they could be.

    ilm compile --topology=v5e:16x16 --gin_file=jobs/phase2_gemma3_27b.gin

  The job is that of `ilm train`: its gin files, its flags, its mesh. Neither data nor weights are
  read. Compiled are the training step of each source, the evaluation of each, and what answers a
  request. It needs libtpu (pip install 'ilm_jax[tpu]') and no TPU.

  Args:
    topology: v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4.
    train: settings of the job, filled in from train.* of the gin files and from flags of `train`.
    shapes: what data decide, fields of `ilm_jax.aot.programs.Sizes`; of a prepared data set that
      is there, only what it does not say itself.
    lm: the language model, by a name of `ilm_jax.lm.decoder_sizes`, where train.lm.name is a
      checkpoint that is not here.
    programs: only those whose names begin so: 'train', 'evaluate', 'recommend beam'.
    decode_rows: prompts that are answered at once; by default one for each part of a batch.
    beam_size: of the search for items.
    json: a file to write the same to.

  Returns:
    What is in the file.

  Raises:
    UsageError: libtpu is missing, a setting is wrong, or a program does not fit.
  """
  chip = chips.chip_of(topology)
  chips.prepare_environment()
  from ilm_jax.aot import programs as jobs
  from ilm_jax.aot import report as reports

  job = dict(train or {})
  import_task_modules(job['modules'])
  sizes = jobs.read_sizes(shapes, job['data'])
  devices = chips.devices_of(topology)
  found, mesh, rules = jobs.programs(
    job, sizes, devices, lm=lm, decode_rows=decode_rows, beam_size=beam_size
  )
  chosen = _chosen(found, (programs,) if isinstance(programs, str) else programs)
  print(f'{topology}: {len(devices)} chips, mesh {dict(mesh.shape)}', flush=True)
  results = []
  for program in chosen:
    results.append(_compile(program, mesh, rules, chip))
    print(reports.text_of(results[-1], chip), flush=True)
  values = {
    'topology': topology,
    'chips': len(devices),
    'mesh': dict(mesh.shape),
    'programs': [result.to_json() for result in results],
  }
  if json is not None:
    json.write_text(json_module.dumps(values, indent=2) + '\n')
  if misfits := [result for result in results if result.misfit]:
    told = '\n'.join(f'{result.name}: {result.misfit}' for result in misfits)
    raise UsageError(f'the job does not fit {topology}, mesh {dict(mesh.shape)}.\n{told}')
  return values


def _chosen(programs: Sequence[Any], names: Sequence[str]) -> list[Any]:
  chosen = [p for p in programs if not names or p.name.startswith(tuple(names))]
  if not chosen:
    raise UsageError(
      f'--programs={list(names)}: there are {", ".join(repr(p.name) for p in programs)}.'
    )
  return chosen


def _compile(program: Any, mesh: Any, rules: Any, chip: chips.Chip) -> Any:
  import jax

  from ilm_jax.aot import hlo
  from ilm_jax.aot import report as reports
  from ilm_jax.runtime import sharding

  kinds, largest = reports.arguments_of(_named(program))
  start = time.monotonic()
  with sharding.use_mesh(mesh, rules):
    traced = program.function.trace(*program.args, **program.options)
    try:
      compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
      if not reports.is_out_of_memory(error):
        raise
      seconds = time.monotonic() - start
      values = reports.largest_values(traced.jaxpr.jaxpr)
      why = reports.misfit(error, largest, values, chip)
      return reports.Report(program.name, seconds, kinds, largest, misfit=why)
  report = reports.Report(program.name, time.monotonic() - start, kinds, largest)
  # Outside of the mesh, whose devices can compute nothing.
  return reports.complete(
    report,
    memory=compiled.memory_analysis(),
    cost=compiled.cost_analysis() or {},
    costs=hlo.costs(compiled.as_text(), mesh.size),
    model_flops=program.model_flops() / mesh.size,
    flops=program.flops() / mesh.size,
    chip=chip,
  )


def _named(program: Any) -> Mapping[str, Any]:
  """Arguments by the names of the function, which tell their category."""
  import inspect

  names = list(inspect.signature(program.function).parameters)
  return dict(zip(names, program.args))
