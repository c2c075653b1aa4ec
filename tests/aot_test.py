"""`ilm compile`: what is read off a program, what does not fit, and jobs for real chips."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ilm_jax.aot import chips, hlo, programs, report
from ilm_jax.config.flags import parse_argv, run_about
from ilm_jax.errors import UsageError
from ilm_jax.main import COMMANDS
from ilm_jax.phases.phase import InputOptions, batch_sizes
from ilm_jax.phases.settings import PhaseSettings
from ilm_jax.runtime import flops
from ilm_jax.runtime.sharding import abstract_init, place_constants
from ilm_jax.train import train
from tests.support import eight_devices, tiny_run

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason="libtpu is not installed: ilm_jax['tpu']"
)
TURNS, ROWS, WIDTH = 12, 64, 32
KEY = jax.random.key(0)


@eight_devices.needed
class TestOnEightDevices:
  @pytest.fixture(scope='class')
  def compiled(self):
    """Layers x @ w_1 @ w_2, w_1 cut by columns, w_2 by rows: one all-reduce each."""
    mesh = jax.make_mesh((2, 4), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)

    def shape(*spec, of):
      sharding = NamedSharding(mesh, PartitionSpec(*spec))
      return jax.ShapeDtypeStruct(of, jnp.float32, sharding=sharding)

    def run(x, first, second):
      def layer(x, weights):
        hidden = jnp.tanh(x @ weights[0])
        x = jax.lax.with_sharding_constraint(hidden @ weights[1], NamedSharding(mesh, rows))
        return jnp.tanh(x), None

      return jax.lax.scan(layer, x, (first, second))[0]

    rows = PartitionSpec('data', None)
    args = (
      shape('data', None, of=(ROWS, WIDTH)),
      shape(None, None, 'tensor', of=(TURNS, WIDTH, 4 * WIDTH)),
      shape(None, 'tensor', None, of=(TURNS, 4 * WIDTH, WIDTH)),
    )
    return jax.jit(run, out_shardings=NamedSharding(mesh, rows)).lower(*args).compile(), run, args

  def test_collectives_inside_a_loop_count_as_often_as_it_runs(self, compiled):
    found = hlo.costs(compiled[0].as_text(), 8)
    assert found.unknown_loops == 0
    assert set(found.collectives) == {'all-reduce'}
    reduced = found.collectives['all-reduce']
    size = ROWS // 2 * WIDTH * 4  # of a device
    assert reduced.count == TURNS
    assert reduced.bytes == TURNS * size
    assert reduced.sent == TURNS * 2 * 3 / 4 * size  # four take part

  def test_traffic_grows_with_the_turns_of_the_loop(self, compiled):
    weights = TURNS * 2 * WIDTH * WIDTH * 4  # of a device: each is read once
    found = hlo.costs(compiled[0].as_text(), 8).hbm_bytes
    assert weights <= found < 20 * weights

  def test_flops_are_those_of_the_closed_form(self, compiled):
    _, run, args = compiled
    assert flops.matmul_flops(run, *args) == TURNS * 2 * 2 * ROWS * WIDTH * 4 * WIDTH
    # The compiler's own count is of one turn on one device.
    once = compiled[0].cost_analysis()['flops']
    assert once < 2 * 2 * 2 * ROWS * WIDTH * 4 * WIDTH / 8

  def test_arguments_by_category(self, compiled):
    sizes, largest = report.arguments_of(
      {'state': {'params': compiled[2][1]}, 'batch': {'x': compiled[2][0]}}
    )
    assert sizes == {
      'trained parameters': TURNS * WIDTH * WIDTH * 4,
      'batch': ROWS // 2 * WIDTH * 4,
    }
    assert largest[0][0].startswith('trained parameters: state/params float32[12, 32, 128]')


# ---------------------------------------------------------------- the text of a program


def test_group_sizes_in_all_ways_of_writing_them():
  for text, size in (
    ('replica_groups={{0,1,2},{3,4,5}}, x={}', 3),
    ('replica_groups=[4,2]<=[8]', 2),
    ("replica_groups=mesh['a'=4,'b'=1,'c'=4], device_ids=([4,4]T(1,0)) {'a'}, y", 4),
    ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
    ('replica_groups={}', 16),
  ):
    assert hlo.group_size(text, 16) == size


def test_bytes_of_shapes():
  assert hlo.shape_bytes('bf16[2,3]{1,0:T(8,128)(2,1)}') == 12
  assert hlo.shape_bytes('(f32[4]{0}, s32[]{:T(128)}, pred[8]{0})') == 16 + 4 + 8
  shape = '(f32[4]{0:T(128)S(1)}, f32[2]{0})'
  assert hlo.shape_bytes(shape, hbm_only=True) == 8
  assert hlo.shape_bytes('s4[8]{0}') == 4


def test_loops_as_libtpu_writes_them():
  """No note of the number of turns; a slice of what is stacked; async collectives; estimates."""
  text = """
%body (p: (s32[], f32[5,8])) -> (s32[], f32[5,8]) {
  %p = (s32[], f32[5,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = f32[5,8]{1,0} get-tuple-element(%p), index=1
  %s = f32[8]{0} fusion(%w, %i), kind=kLoop, calls=%slice, backend_config={"estimated_cycles":"7"}
  %ar = f32[8]{0} all-reduce-start(%s), replica_groups={{0,1}}, to_apply=%add
  %done = f32[8]{0} all-reduce-done(%ar)
  ROOT %t = (s32[], f32[5,8]{1,0}) tuple(%i, %w)
}

%condition (q: (s32[], f32[5,8])) -> pred[] {
  %limit = s32[] constant(5)
  %q = (s32[], f32[5,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

%slice (a: f32[5,8], b: s32[]) -> f32[8] {
  %a = f32[5,8]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %zero = s32[] constant(0)
  %d = f32[1,8]{1,0} dynamic-slice(%a, %b, %zero), dynamic_slice_sizes={1,8}
  ROOT %r = f32[8]{0} bitcast(%d)
}

ENTRY %main (x: (s32[], f32[5,8])) -> (s32[], f32[5,8]) {
  %x = (s32[], f32[5,8]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[5,8]{1,0}) while(%x), condition=%condition, body=%body
}
"""
  found = hlo.costs(text, 2)
  assert found.unknown_loops == 0
  assert found.cycles == 5 * 7
  assert found.collectives == {'all-reduce': hlo.Collective(5, 5 * 32, 5 * 32)}
  # In each turn: 32 bytes and an index are read, 32 written, 32 reduced.
  assert found.hbm_bytes == 5 * (32 + 4 + 32 + 2 * 32)


def test_fusions_within_fusions_and_collectives_within_them():
  text = """
%slice (a: f32[5,8], b: s32[]) -> f32[1,8] {
  %a = f32[5,8]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %d = f32[1,8]{1,0} dynamic-slice(%a, %b, %zero), dynamic_slice_sizes={1,8}
}

%outer (c: f32[5,8], e: s32[]) -> f32[1,8] {
  %c = f32[5,8]{1,0} parameter(0)
  %e = s32[] parameter(1)
  %same = f32[5,8]{1,0} bitcast(%c)
  %f = f32[1,8]{1,0} fusion(%same, %e), kind=kLoop, calls=%slice
  ROOT %sum = f32[1,8]{1,0} all-reduce(%f), replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main (x: f32[5,8], i: s32[]) -> f32[1,8] {
  %x = f32[5,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %out = f32[1,8]{1,0} fusion(%x, %i), kind=kCustom, calls=%outer
}
"""
  found = hlo.costs(text, 2)
  assert found.collectives == {'all-reduce': hlo.Collective(1, 32, 32)}
  # A slice and an index are read, the sum is written; what goes on inside is not in HBM.
  assert found.hbm_bytes == 32 + 4 + 32


def test_a_collective_that_is_spread_over_fusions_counts_once():
  """As libtpu writes it for v5e: begun, gone on with beside a sum, waited for."""
  gather = '%all = f32[16] all-gather(%shard), replica_groups={{0,1}}, x={chain_id="3"}'
  alias = 'kind=kCustom, output_to_operand_aliasing='
  both = alias + '{{1}: (0, {}), {2}: (1, {})}'
  text = f"""
%begin (shard: f32[8]) -> (f32[8], f32[16]) {{
  %shard = f32[8] parameter(0)
  {gather}
  ROOT %c = (f32[8], f32[16]) custom-call(%all), custom_call_target="AsyncCollectiveStart"
}}

%beside (shard: f32[8], whole: f32[16], a: f32[4], b: f32[4]) -> (f32[4], f32[8], f32[16]) {{
  %shard = f32[8] parameter(0)
  %whole = f32[16] parameter(1)
  {gather}
  %a = f32[4] parameter(2)
  %b = f32[4] parameter(3)
  %sum = f32[4] add(%a, %b)
  ROOT %t = (f32[4], f32[8], f32[16]) tuple(%sum, %shard, %whole)
}}

%end (shard: f32[8], whole: f32[16]) -> f32[16] {{
  %shard = f32[8] parameter(0)
  %whole = f32[16] parameter(1)
  {gather}
  ROOT %c = f32[16] custom-call(%shard, %whole, %all), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (x: f32[8], y: f32[4]) -> f32[16] {{
  %x = f32[8] parameter(0)
  %y = f32[4] parameter(1)
  %s = (f32[8], f32[16]) fusion(%x), {alias}{{{{0}}: (0, {{}})}}, calls=%begin
  %s0 = f32[8] get-tuple-element(%s), index=0
  %s1 = f32[16] get-tuple-element(%s), index=1
  %m = (f32[4], f32[8], f32[16]) fusion(%s0, %s1, %y, %y), {both}, calls=%beside
  %m1 = f32[8] get-tuple-element(%m), index=1
  %m2 = f32[16] get-tuple-element(%m), index=2
  ROOT %out = f32[16] fusion(%m1, %m2), {alias}{{{{}}: (1, {{}})}}, calls=%end
}}
"""
  found = hlo.costs(text, 2)
  assert found.collectives == {'all-gather': hlo.Collective(1, 64, 32)}
  # A part is read, the whole is written; beside it, two vectors are read and their sum written.
  assert found.hbm_bytes == (32 + 64) + 3 * 16


# ---------------------------------------------------------------- what does not fit


def test_what_does_not_fit_is_told_with_what_helps():
  error = RuntimeError(
    'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm.'
    ' Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.\n\n'
    '  Largest program allocations in hbm:\n\n'
    '  1. Size: 6.00G\n     Operator: op_name="jit(step)/mlp/dot_general"\n'
    '     Shape: bf16[64,2048,24576]{2,1,0:T(8,128)(2,1)}\n     Unpadded size: 6.00G\n'
    '     XLA label: fusion\n     Allocation type: HLO temp\n     ==========\n'
  )
  assert report.is_out_of_memory(error)
  largest = (('language model: frozen/lm/x bf16[8]', 9 * 10**9), ('batch: t int32[8]', 10))
  told = report.misfit(error, largest, (), chips.CHIPS['v5e'])
  assert 'needs 20.50 GiB of 15.75 GiB of HBM' in told
  assert re.search(r'6.00G  bf16\[64,2048,24576\]  HLO temp  jit\(step\)/mlp/dot_general', told)
  helps = told.splitlines()[-1]
  assert helps.startswith('what helps: a larger fsdp or tensor axis of train.mesh; train.lm.int8')
  for knob in ('remat', 'accumulate_steps', 'batch_size'):
    assert knob in helps


def test_what_does_not_fit_and_the_compiler_names_nothing():
  error = RuntimeError(
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries'
    ' (17.03G) exceeds available HBM (15.75G).'
  )

  @jax.jit
  def step(x):
    def body(x, _):
      return x, jnp.sin(x)

    return jax.lax.scan(body, x, None, 7)[1].sum()

  values = report.largest_values(step.trace(jnp.zeros(1024)).jaxpr.jaxpr)
  assert values[0] == ('float32[7, 1024] of scan', 7 * 4096)
  told = report.misfit(error, (), values, chips.CHIPS['v5e'])
  assert 'needs 17.03 GiB of 15.75 GiB of HBM' in told
  assert 'float32[7, 1024] of scan' in told


# ---------------------------------------------------------------- shapes, as of the real thing


@pytest.fixture(scope='module')
def films(tmp_path_factory):
  folder = tmp_path_factory.mktemp('aot')
  return tiny_run.write_data(folder / 'films'), tiny_run.write_lm(folder / 'lm')


def job_of(*words):
  words = [*words, '--gin.MODEL_DIR=-']
  return dict(parse_argv(train, words, other_commands=COMMANDS)[0].arguments)


def shapes_of(tree):
  return {
    jax.tree_util.keystr(path): (x.shape, x.dtype)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize(
  'words',
  [
    ('--gin_file=jobs/phase1_ml100k.gin', '--gin_file=local_tiny.gin'),
    ('--gin_file=jobs/phase2_gemma2_2b.gin', '--gin_file=local_tiny_phase2.gin', '--gin.MESH=None',
     '--gin.LM_ATTENTION=xla'),
  ],
  ids=['phase1', 'phase2'],
)  # fmt: skip
def test_programs_without_data_are_those_with_data(films, words):
  data, lm = films
  words = (*words, f'--gin.DATA={data}', *([f'--gin.LM={lm}'] if 'phase2' in words[0] else []))
  job = job_of(*words)
  found, mesh, rules = programs.programs(
    job, programs.read_sizes(None, job['data']), jax.devices()[:1]
  )
  options = {k: job[k] for k in ('item_encoder', 'losses', 'text', 'lm') if job[k] is not None}
  options['item_encoder'].pop('init_from', None)
  rows = batch_sizes(job['batch_size'], job['schedule'], 1)
  phase = PhaseSettings(job['model'], options).make(InputOptions(data, None, rows, 0, mesh, rules))
  for program in found[: len(rows)]:
    state, frozen, batch, _ = program.args
    assert shapes_of(state.params) == shapes_of(abstract_init(phase.init, mesh, rules, KEY))
    real = place_constants(phase.frozen, mesh, rules)
    # The language model is laid out for a TPU; histories are as long as data happen to be.
    for name in set(frozen.__dataclass_fields__) - {'lm', 'histories'}:
      assert shapes_of(getattr(frozen, name)) == shapes_of(getattr(real, name)), name
    source = program.options['source']
    read = next(phase.reader(source, 0, None))
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
      name: (x.shape, x.dtype) for name, x in read.items()
    }


def test_a_large_catalogue_is_split_where_it_fills_its_parts(films):
  data, lm = films
  words = '--gin_file=jobs/phase2_gemma2_2b.gin', '--gin_file=local_tiny_phase2.gin'
  words = *words, '--gin.MESH=None', '--gin.LM_ATTENTION=xla', f'--gin.LM={lm}'
  job = job_of(*words, f'--gin.DATA={data}')
  sizes = programs.Sizes(items=1 << 17, users=8, cf_dim=8, prefix_tokens=4)
  found, *_ = programs.programs(job, sizes, jax.devices()[:1])
  (readout,) = [program for program in found if program.name == 'recommend readout']
  vectors = readout.args[-1]
  assert vectors.shape[0] == sizes.items  # nothing is padded
  assert vectors.sharding.spec == jax.sharding.PartitionSpec(('data', 'fsdp', 'tensor'), None)


def test_a_change_of_the_rules_that_changes_nothing_is_an_error(films):
  words = '--gin_file=jobs/phase1_ml100k.gin', '--gin_file=local_tiny.gin'
  job = job_of(*words, f'--gin.DATA={films[0]}') | {'sharding_rules': {'kv_heads': 'tensor'}}
  sizes = programs.read_sizes(None, job['data'])
  with pytest.raises(UsageError, match=r"\('kv_heads', 'tensor'\): no array of this job has"):
    programs.programs(job, sizes, jax.devices()[:1])


# ---------------------------------------------------------------- the command


def noted(*, topology: str, train: dict | None = None, rows: int = 1):
  return topology, train, rows


def test_flags_of_the_command_and_of_the_job(tmp_path):
  file = tmp_path / 'job.gin'
  file.write_text(
    'MODEL_DIR = %gin.REQUIRED\nSTEPS = 3\ntrain.model_dir = %MODEL_DIR\nnoted.rows = 5\n'
    'train.total_steps = %STEPS\n'
  )
  words = [f'--gin_file={file}', '--topology', 'v5e:2x2', '--gin.STEPS=7', '--batch_size=32']
  topology, job, rows = run_about(
    noted, train, words, placeholders=('model_dir', 'data'), other_commands=('noted', 'train')
  )
  assert (topology, rows, job['total_steps'], job['batch_size']) == ('v5e:2x2', 5, 7, 32)
  expected = parse_argv(
    train, [words[0], *words[3:], '--gin.MODEL_DIR=-', '--data=-'], other_commands=('noted',)
  )[0]
  assert job == dict(expected.arguments)


def test_topologies_that_are_none():
  with pytest.raises(UsageError, match="Did you mean 'v5"):
    chips.chip_of('v5f:2x2')
  with pytest.raises(UsageError, match='CHIP:SIZE'):
    chips.chip_of('v5e')
  with pytest.raises(UsageError, match='no side of a slice has more than 16 chips'):
    chips.devices_of('v5e:32x32')


def test_libtpu_is_missing(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UsageError, match=re.escape("pip install 'ilm_jax[tpu]'")):
    chips.prepare_environment()


def test_a_libtpu_that_does_not_go_with_jax_is_told(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
  versions = {'libtpu': '0.0.1', 'jax': '9.9'}
  monkeypatch.setattr(chips, 'version', versions.get)
  with pytest.warns(UserWarning, match=r'libtpu 0\.0\.1 is installed, but jax 9\.9 goes with \d'):
    chips.check_libtpu()


@pytest.mark.parametrize('name', chips.CHIPS)
def test_clocks_are_plausible(name):
  assert 1.4e9 < chips.CHIPS[name].cycles < 2.4e9


def ilm_compile(*words):
  return subprocess.run(
    [sys.executable, '-m', 'ilm_jax.main', 'compile', '--topology=v5e:2x2', *words],
    capture_output=True,
    text=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )


TINY = [
  '--gin_file=jobs/phase1_ml100k.gin',
  '--gin_file=local_tiny.gin',
  "--shapes={'items': 100, 'users': 50, 'cf_dim': 8}",
]


@needs_libtpu
def test_a_job_for_real_chips(tmp_path):
  file = tmp_path / 'report.json'
  done = ilm_compile(*TINY, f'--json={file}')
  assert done.returncode == 0, done.stderr
  values = json.loads(file.read_text())
  names = [program['name'] for program in values['programs']]
  assert names == ['train item_text', 'train user_item', 'evaluate item_text', 'evaluate user_item']
  step = values['programs'][0]
  assert step['hbm']['aliased'] > 0  # the state is given up for the next one
  # Adam has two moments of every parameter, and two counts of steps.
  assert step['arguments']['optimizer'] - 2 * step['arguments']['trained parameters'] <= 64
  assert step['collectives']['all-reduce']['count'] >= 1
  assert 0 < step['mfu_bound'] < 1
  assert np.isclose(step['model_flops'] * 4, step['flops'] * 4, rtol=1e-6)  # without remat


@needs_libtpu
def test_a_job_that_does_not_fit():
  table = '--shapes.items=300_000_000', '--shapes.cf_dim=128'
  done = ilm_compile(*TINY, *table, '--programs=train user_item')
  assert done.returncode == 2
  assert 'does not fit v5e:2x2' in done.stderr
  assert 'entity table: ' in done.stderr
