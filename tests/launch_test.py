"""Launchers: what reaches `ilm` at the far side, through real shells and programs that stand in.

The programs on the path (gcloud, xpk, sbatch, ...) are one script, `_FAR_SIDE`, which does to its
words what the real ones do to theirs: ssh has a shell read them, Kubernetes replaces $(NAME).
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
SHELL_LAUNCHERS = ('local.sh', 'tpu_vm.sh', 'gke_xpk.sh', 'slurm.sh')
LAUNCHERS = (*SHELL_LAUNCHERS, 'xm_launch.py')

_FAR_SIDE = r"""#!{python}
import json, os, re, signal, subprocess, sys, time
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
bash = lambda script: sys.exit(subprocess.run(['bash', '-c', script]).returncode)
option = lambda flag: [word[len(flag) + 1:] for word in words if word.startswith(flag + '=')][-1]
record = {{'name': name, 'words': words, 'a': os.environ.get('A')}}
with open(os.environ['RECORD'], 'a') as file:
  file.write(json.dumps(record) + '\n')
if name == 'ilm' and 'ILM_SAVES' in os.environ:  # runs until it is told to stop, then saves
  stopped = []
  signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
  open(os.environ['ILM_SAVES'] + '.started', 'a').close()
  while not stopped:
    time.sleep(.02)
  time.sleep(.3)
  open(os.environ['ILM_SAVES'], 'a').write('saved\n')
if name == 'ilm':
  sys.exit(int(os.environ.get('ILM_STATUS', 0)))
if name == 'gcloud' and 'ssh' in words:  # as gcloud takes --command apart, and ssh joins it
  os.chdir(os.environ['WORKER'])
  bash(' '.join(option('--command').split(' ')))
if name == 'xpk':
  variables = {{'HOME': '/root', 'PATH': '/bin'}}
  def expand(match):
    if match[0] == '$$':
      return '$'
    return variables.get(match[1], match[0])
  script = re.sub(r'\$\$|\$\(([^)]*)\)', expand, option('--command'))
  assert '\n' not in script
  os.execvp('bash', ['bash', '-c', '''
    _sigterm() (kill -SIGTERM $! 2>/dev/null;);
    trap _sigterm SIGTERM;
    (COMMAND) & PID=$!;
    while kill -0 $PID 2>/dev/null; do sleep .1; done;
    wait $PID;
    EXIT_CODE=$?;
    exit $EXIT_CODE'''.replace('COMMAND', script)])
if name == 'sbatch':
  script = next(i for i, word in enumerate(words) if not word.startswith('--'))
  os.environ.update(SLURM_JOB_ID='42', SLURM_CPUS_PER_TASK='8')
  os.execvp(words[script], words[script:])
if name == 'srun':
  first = next(i for i, word in enumerate(words) if not word.startswith('--'))
  with open(os.environ['RECORD'] + '.task', 'w') as file:
    file.write(str(os.getpid()))
  os.execvp(words[first], words[first:])
if name == 'scancel':
  os.kill(int(open(os.environ['RECORD'] + '.task').read()), signal.SIGTERM)
"""

# Each is one word of the command line.
NASTY = (
  '--gin_file=jobs/with a space.gin',
  "--gin.SCHEDULE=['item_text', 'item_item']",
  '--gin.TEXT="it\'s $HOME and $(id) and `id` and \\back\\slash!"',
  "--mesh={'data': -1, 'tensor': 2}",
  '--gin.GLOB=*?[a-z]~ #;&|<>(x)',
  '--gin.TWO=a  b   c',
  '--gin.MONEY=$$ $! $? $0 %s %q $PATH',
  '--gin.NONE=',
  '--gin.LETTERS=é漢字',
)
WITH_LINE_BREAK = (*NASTY, "--gin.LINES='''one\ntwo\t$(three)'''")

REQUIRED = {
  'local.sh': [],
  'tpu_vm.sh': ['--tpu=pod', '--zone=us-west4-a', '--project=some-project'],
  'gke_xpk.sh': [
    *('--workload=first', '--cluster=pods', '--project=some-project', '--zone=us-west4-a'),
    *('--tpu_type=v5litepod-16', '--image=somewhere/ilm:1'),
  ],
  'slurm.sh': ['--nodes=2', '--gpus_per_node=4', '--time=1-12:00:00'],
  'xm_launch.py': [],
}


@pytest.fixture(name='far_side')
def _far_side(tmp_path, monkeypatch):
  """Programs that stand in for the real ones; returns what was called: [(name, words)]."""
  programs = tmp_path / 'bin'
  programs.mkdir()
  file = programs / 'ilm'
  file.write_text(_FAR_SIDE.format(python=sys.executable))
  file.chmod(0o755)
  for name in ('gcloud', 'xpk', 'sbatch', 'srun', 'scancel', 'scontrol'):
    (programs / name).symlink_to(file)
  record, worker = tmp_path / 'record', tmp_path / 'worker'
  (worker / 'ilm_env/bin').mkdir(parents=True)
  (worker / 'ilm_env/bin/ilm').symlink_to(file)
  monkeypatch.setenv('PATH', f'{programs}:{os.environ["PATH"]}')
  monkeypatch.setenv('RECORD', str(record))
  monkeypatch.setenv('WORKER', str(worker))

  def called(name=None):
    lines = record.read_text().splitlines() if record.exists() else []
    return [x for x in map(json.loads, lines) if name in (None, x['name'])]

  return called


def _command(launcher, *words):
  program = ['bash'] if launcher.endswith('.sh') else [sys.executable]
  return [*program, str(LAUNCH / launcher), *words]


def _run(launcher, *words, cwd=None):
  return subprocess.run(
    _command(launcher, *words), capture_output=True, text=True, timeout=60, cwd=cwd
  )


def _wait_for(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'nothing came'
    time.sleep(0.02)


def _flags_for(launcher):
  # A line of YAML cannot have a line break: that is refused, below.
  return NASTY if launcher == 'gke_xpk.sh' else WITH_LINE_BREAK


def _own(launcher):
  return ['--multiprocess'] if launcher in ('tpu_vm.sh', 'gke_xpk.sh', 'slurm.sh') else []


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_printed_command_brings_the_words_to_ilm(launcher, far_side, tmp_path):
  flags = _flags_for(launcher)
  environment = ['--env=A=x y $HOME \'"', '--env=XLA_FLAGS=--a=1 --b=2']
  done = _run(launcher, *REQUIRED[launcher], *environment, '--dry_run', 'train', *flags)
  assert done.returncode == 0, done.stderr
  assert far_side() == []  # nothing was run

  subprocess.run(['bash', '-c', done.stdout], check=True, timeout=60)
  _wait_for(lambda: far_side('ilm'))
  [ilm] = far_side('ilm')
  assert ilm['words'] == ['train', *_own(launcher), *flags]
  assert ilm['a'] == 'x y $HOME \'"'


@pytest.mark.parametrize('launcher', SHELL_LAUNCHERS)
def test_without_dry_run_it_is_run(launcher, far_side):
  flags = _flags_for(launcher)
  done = _run(launcher, *REQUIRED[launcher], 'evaluate', *flags)
  assert done.returncode == 0, done.stderr
  _wait_for(lambda: far_side('ilm'))
  [ilm] = far_side('ilm')
  assert ilm['words'] == ['evaluate', *_own(launcher), *flags]


@pytest.mark.parametrize('locale', ['C', 'C.UTF-8'])
def test_words_do_not_depend_on_the_locale(locale, far_side, monkeypatch):
  monkeypatch.setenv('LC_ALL', locale)
  done = _run('gke_xpk.sh', *REQUIRED['gke_xpk.sh'], 'train', '--gin.X=é漢字')
  assert done.returncode == 0, done.stderr
  assert far_side('ilm')[0]['words'][-1] == '--gin.X=é漢字'


@pytest.mark.parametrize('value', ['a\nb', "'\n$(HOME)'"])
def test_xpk_refuses_what_kubernetes_would_change(value):
  done = _run('gke_xpk.sh', *REQUIRED['gke_xpk.sh'], '--dry_run', 'train', f'--gin.X={value}\x01$$')
  assert done.returncode == 2
  assert 'does not get' in done.stderr


def test_local_runs_as_several_processes(far_side):
  done = _run(
    *('local.sh', '--processes=3', '--cpu_devices=2', '--port=23456', 'train', '--gin.X=[1, 2]')
  )
  assert done.returncode == 0, done.stderr
  calls = sorted(far_side('ilm'), key=lambda call: call['words'])
  assert [call['words'] for call in calls] == [
    [
      *('train', '--multiprocess', '--coordinator=localhost:23456', '--num_processes=3'),
      *(f'--process_id={i}', '--gin.X=[1, 2]'),
    ]
    for i in range(3)
  ]


@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('status', [0, 3])
def test_local_forwards_a_signal_and_waits_for_the_save(
  processes, status, far_side, tmp_path, monkeypatch
):
  saves = tmp_path / 'saves'
  monkeypatch.setenv('ILM_SAVES', str(saves))
  monkeypatch.setenv('ILM_STATUS', str(status))
  words = ['--cpu_devices=1', f'--processes={processes}', 'train', '--gin.X=1']
  process = subprocess.Popen(_command('local.sh', *words))
  _wait_for(lambda: len(far_side('ilm')) == processes and Path(f'{saves}.started').exists())
  time.sleep(0.5)  # the others' handlers
  process.send_signal(signal.SIGTERM)
  assert process.wait(20) == status
  assert saves.read_text() == 'saved\n' * processes


def test_cpu_devices_are_what_jax_sees():
  show = 'import jax; print(jax.device_count(), jax.devices()[0].platform)'
  done = _run('local.sh', '--cpu_devices=3', '--dry_run', 'train', '--x=1')
  words = shlex.split(done.stdout)
  pairs = dict(word.split('=', 1) for word in words[1 : words.index('train') - 1])
  shown = subprocess.run(
    [sys.executable, '-c', show], env={**os.environ, **pairs}, capture_output=True, text=True
  )
  assert shown.stdout.split() == ['3', 'cpu']


def test_tpu_vm_installs_a_wheel_and_copies_before_it_runs(far_side, tmp_path):
  wheel, folder = tmp_path / 'ilm_jax-0.1.0-py3-none-any.whl', tmp_path / 'my jobs'
  wheel.touch()
  folder.mkdir()
  pip = tmp_path / 'worker/ilm_env/bin/pip'
  pip.symlink_to(tmp_path / 'bin/ilm')
  (tmp_path / 'worker/ilm_env/bin/python').symlink_to(sys.executable)
  done = _run(
    *('tpu_vm.sh', *REQUIRED['tpu_vm.sh'], f'--install={wheel}', f'--copy={folder}'),
    *('train', '--gin_file=my jobs/x.gin'),
  )
  assert done.returncode == 0, done.stderr
  where = ['--zone=us-west4-a', '--project=some-project', '--worker=all']
  calls = [call['words'] for call in far_side('gcloud')]
  kinds = [words[3] for words in calls]
  assert kinds == ['scp', 'scp', 'ssh', 'ssh']
  copy = ['compute', 'tpus', 'tpu-vm', 'scp', '--recurse']
  assert calls[0] == [*copy, str(folder), 'pod:', *where]
  assert calls[1] == [*copy, str(wheel), 'pod:', *where]
  assert [words[:-1] for words in calls[2:]] == [
    ['compute', 'tpus', 'tpu-vm', 'ssh', 'pod', *where]
  ] * 2
  wanted = './ilm_jax-0.1.0-py3-none-any.whl[tpu]'
  assert [call['words'] for call in far_side('pip')] == [
    ['install', '--quiet', wanted],
    ['install', '--quiet', '--force-reinstall', '--no-deps', wanted],
  ]


def test_tpu_vm_follows_stops_and_refuses_a_second_job(far_side, tmp_path, monkeypatch):
  saves = tmp_path / 'saves'
  monkeypatch.setenv('ILM_SAVES', str(saves))
  at = REQUIRED['tpu_vm.sh']
  assert _run('tpu_vm.sh', *at, '--name=one', 'train', '--gin.X=1').returncode == 0
  _wait_for(lambda: Path(f'{saves}.started').exists())

  second = _run('tpu_vm.sh', *at, '--name=one', 'train', '--gin.X=2')
  assert second.returncode == 1
  assert 'the job one runs already' in second.stderr
  assert len(far_side('ilm')) == 1

  logs = _run('tpu_vm.sh', *at, '--name=one', '--worker=3', '--logs', '--dry_run')
  words = shlex.split(logs.stdout)
  assert words[-2:] == ['--worker=3', '--command=tail -n 100 -F ilm_jobs/one.log']
  assert (tmp_path / 'worker/ilm_jobs/one.log').exists()

  assert _run('tpu_vm.sh', *at, '--name=one', '--stop').returncode == 0
  _wait_for(saves.exists)


def test_gke_starts_again_what_was_told_to_stop(far_side, tmp_path, monkeypatch):
  saves = tmp_path / 'saves'
  monkeypatch.setenv('ILM_SAVES', str(saves))
  process = subprocess.Popen(
    _command('gke_xpk.sh', *REQUIRED['gke_xpk.sh'], '--dry_run', 'train', '--gin.X=1'),
    stdout=subprocess.PIPE,
  )
  printed, _ = process.communicate(timeout=20)
  pod = subprocess.Popen(['bash', '-c', 'exec ' + printed.decode()])
  _wait_for(lambda: Path(f'{saves}.started').exists())
  pod.send_signal(signal.SIGTERM)
  assert pod.wait(20) == 143  # not 0, with which ilm ends
  assert saves.read_text() == 'saved\n'


@pytest.mark.parametrize('status', [0, 1])
def test_gke_ends_as_ilm_ends(status, far_side, monkeypatch):
  monkeypatch.setenv('ILM_STATUS', str(status))
  done = _run('gke_xpk.sh', *REQUIRED['gke_xpk.sh'], 'train', '--gin.X=1')
  assert done.returncode == status
  assert len(far_side('ilm')) == 1


def test_slurm_asks_for_a_process_for_each_gpu(far_side):
  more = ['--sbatch=--partition=gpu', '--save_seconds=120', '--name=big']
  assert _run('slurm.sh', *REQUIRED['slurm.sh'], *more, 'train', '--gin.X=1').returncode == 0
  [sbatch] = far_side('sbatch')
  assert {
    *('--nodes=2', '--ntasks-per-node=4', '--gpus-per-node=4', '--time=1-12:00:00', '--requeue'),
    *('--signal=B:USR1@120', '--partition=gpu', '--output=big-%j.log', '--open-mode=append'),
  } <= set(sbatch['words'])
  assert far_side('scontrol') == []  # it ended by itself


@pytest.mark.parametrize('status', [0, 1])
def test_slurm_saves_and_is_queued_again_before_its_time_is_up(
  status, far_side, tmp_path, monkeypatch
):
  saves = tmp_path / 'saves'
  monkeypatch.setenv('ILM_SAVES', str(saves))
  monkeypatch.setenv('ILM_STATUS', str(status))
  monkeypatch.setenv('SLURM_JOB_ID', '42')
  job = subprocess.Popen([LAUNCH / 'slurm_job.sh', 'srun', '--x', 'ilm', 'train'])
  _wait_for(lambda: Path(f'{saves}.started').exists())
  job.send_signal(signal.SIGUSR1)
  assert job.wait(20) == status
  assert saves.read_text() == 'saved\n'
  assert [call['words'] for call in far_side('scancel')] == [['--signal=TERM', '42']]
  again = [call['words'] for call in far_side('scontrol')]
  assert again == ([['requeue', '42']] if status == 0 else [])  # what failed would fail again


WRONG = {
  'local.sh': [
    (['--processes=2', 'train', '--x=1'], '--cpu_devices=N as well'),
    (['--processes=none', 'train', '--x=1'], '--processes=none: a number'),
    (['--cpu_devices=0', 'train', '--x=1'], '--cpu_devices=0: a number'),
    (['--ilm=/nowhere/ilm', 'train', '--x=1'], 'no program /nowhere/ilm'),
  ],
  'tpu_vm.sh': [
    (['--zone=us-west4-a', '--project=p', 'train', '--x=1'], '--tpu=... is missing'),
    (['--tpu=pod', '--project=p', 'train', '--x=1'], '--zone=... is missing'),
    (['--tpu=pod', '--zone=us-west4-a', 'train', '--x=1'], '--project=... is missing'),
    (['--tpu=', '--zone=us-west4-a', '--project=p', 'train'], '--tpu=... is missing'),
    (['--tpu=pod', '--zone=us-west4', '--project=p', 'train'], 'a zone is like us-west4-a'),
    (['--tpu=a b', '--zone=us-west4-a', '--project=p', 'train'], '--tpu=a b: lower-case'),
    ([*REQUIRED['tpu_vm.sh'], '--name=a/b', 'train'], '--name=a/b: letters'),
    ([*REQUIRED['tpu_vm.sh'], '--install=nowhere.whl'], 'there is no nowhere.whl'),
    ([*REQUIRED['tpu_vm.sh'], '--install=ilm'], 'a wheel (pip wheel'),
    ([*REQUIRED['tpu_vm.sh'], '--copy=/nowhere', 'train'], 'there is no /nowhere'),
    ([*REQUIRED['tpu_vm.sh'], '--stop', 'train'], '--stop is for a job that runs already'),
  ],
  'gke_xpk.sh': [
    ([*REQUIRED['gke_xpk.sh'], f'--{name}=', 'train'], f'--{name}=... is missing')
    for name in ('workload', 'cluster', 'project', 'zone', 'tpu_type', 'image')
  ]
  + [
    ([*REQUIRED['gke_xpk.sh'], '--workload=Big', 'train'], 'at most 40 lower-case letters'),
    ([*REQUIRED['gke_xpk.sh'], '--workload=' + 'a' * 41, 'train'], 'at most 40'),
    ([*REQUIRED['gke_xpk.sh'], '--max_restarts=-1', 'train'], '--max_restarts=-1: a number'),
  ],
  'slurm.sh': [
    ([*REQUIRED['slurm.sh'], f'--{name}=', 'train'], f'--{name}=... is missing')
    for name in ('nodes', 'gpus_per_node', 'time')
  ]
  + [
    ([*REQUIRED['slurm.sh'], '--nodes=two', 'train'], '--nodes=two: a number'),
    ([*REQUIRED['slurm.sh'], '--time=soon', 'train'], '--time=soon: minutes'),
  ],
  'xm_launch.py': [
    (['--executor=vertex', 'train'], 'needs --image'),
    (['--executor=moon', 'train'], 'invalid choice'),
    (['--resource=H100', 'train'], 'write --resource=NAME=N'),
    (['--executor=vertex', '--image=i', 'train', '--gin.X=$(id)'], 'mean something to Kubernetes'),
    (['--ilm=/nowhere/ilm', 'train', '--x=1'], "no program '/nowhere/ilm'"),
  ],
}
WRONG_EVERYWHERE = [
  ([], 'what is to run'),
  (['demo'], 'train'),
  (['train', '--gin.X=[1,', '2]'], '2] is no flag'),
  (['--env=1A=2', 'train'], 'write --env=NAME=VALUE'),
  (['--nonsense=1', 'train'], '--nonsense=1'),
]


@pytest.mark.parametrize(
  ('launcher', 'words', 'message'),
  [(launcher, *case) for launcher, cases in WRONG.items() for case in cases]
  + [
    (launcher, [*REQUIRED[launcher], *words], message)
    for launcher in LAUNCHERS
    for words, message in WRONG_EVERYWHERE
  ],
)
def test_mistakes_are_told_before_anything_runs(launcher, words, message, far_side):
  done = _run(launcher, *words)
  assert done.returncode == 2
  # xm_launch.py shows what it quotes by its repr.
  assert message in done.stderr.replace("'2]'", '2]').replace('unrecognized arguments: ', '')
  assert 'Traceback' not in done.stderr
  assert far_side() == []


@pytest.mark.parametrize('launcher', ['tpu_vm.sh', 'gke_xpk.sh', 'slurm.sh'])
@pytest.mark.parametrize(
  'flag', ['--multiprocess', '--coordinator=h:1', '--num_processes=2', '--process_id=0']
)
def test_what_the_launcher_decides_is_not_given(launcher, flag):
  done = _run(launcher, *REQUIRED[launcher], '--dry_run', 'train', flag)
  assert done.returncode == 2
  assert f'{flag}: leave it out' in done.stderr


@pytest.mark.parametrize('failing', [0, 1])
def test_local_fails_where_one_of_its_processes_does(failing, tmp_path):
  program = tmp_path / 'ilm'
  program.write_text(f'#!/bin/bash\n[[ "$*" != *--process_id={failing}* ]] || exit 3\n')
  program.chmod(0o755)
  words = [f'--ilm={program}', '--processes=2', '--cpu_devices=1', 'train', '--gin.X=1']
  assert _run('local.sh', *words).returncode == 3


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_help_tells_every_flag(launcher, far_side):
  done = _run(launcher, '--help')
  assert done.returncode == 0
  text = (LAUNCH / launcher).read_text()
  if launcher.endswith('.sh'):
    text += (LAUNCH / 'common.sh').read_text()
    flags = set(re.findall(r'^ +(?:-\S+ \| )?(--[a-z_]+)=[^)]*\)', text, re.MULTILINE)) | {
      '--dry_run'
    }
  else:
    flags = set(re.findall(r"add\(\s*'(--[a-z_]+)'", text))
  assert len(flags) > 3
  assert [flag for flag in flags if f'\n  {flag}' not in done.stdout] == []
  unknown = _run(launcher, '--nonsense')
  if launcher.endswith('.sh'):
    assert [flag for flag in flags if flag not in unknown.stderr] == []
  assert far_side() == []


def test_xmanager_is_asked_for_when_it_is_absent(far_side):
  block = "import sys; sys.modules['xmanager'] = None; sys.path.insert(0, sys.argv.pop(1));"
  run = [sys.executable, '-c', block + 'import xm_launch; xm_launch.main()', str(LAUNCH)]
  done = subprocess.run([*run, 'train', '--gin.X=1'], capture_output=True, text=True, timeout=60)
  assert done.returncode == 2
  assert 'pip install xmanager' in done.stderr


@pytest.mark.parametrize('script', sorted(path.name for path in LAUNCH.glob('*.sh')))
def test_shellcheck_finds_nothing(script):
  shellcheck = Path(sys.executable).parent / 'shellcheck'
  done = subprocess.run(
    [shellcheck, '--external-sources', f'launch/{script}'], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


def test_container_installs_all_of_the_package():
  text = (ROOT / 'Containerfile').read_text()
  sources = [line.split()[1:-1] for line in text.splitlines() if re.match(r'COPY (?!--)', line)]
  copied = {name for names in sources for name in names}
  assert {'setup.py', 'pyproject.toml', 'ilm_jax', 'tasks', 'gin'} <= copied
  assert [name for name in copied if not (ROOT / name).exists()] == []


def _documented():
  blocks = re.findall(r'```\n(.*?)```', (ROOT / 'docs/pods.md').read_text(), re.DOTALL)
  lines = [line for block in blocks for line in block.replace('\\\n', ' ').splitlines()]
  found = [line for line in lines if re.match(r'launch/[a-z]|python launch/', line)]
  assert len(found) > 6
  return found


@pytest.mark.parametrize('line', _documented())
def test_documented_commands_are_right(line, far_side, tmp_path):
  (tmp_path / 'dist').mkdir()
  (tmp_path / 'dist/ilm_jax-0.1.0-py3-none-any.whl').touch()
  line = re.sub(r'((?:python )?launch/\S+)', r'\1 --dry_run', line, count=1)
  line = line.replace('launch/', f'{LAUNCH}/').replace('python ', f'{sys.executable} ')
  variables = 'PROJECT=my-project ZONE=us-west4-a; at="--tpu=ilm --zone=$ZONE --project=$PROJECT";'
  done = subprocess.run(
    ['bash', '-c', variables + line], cwd=tmp_path, capture_output=True, text=True, timeout=60
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout
  for job in re.findall(r'--gin_file=(jobs/\S+)', line):
    assert (ROOT / 'gin' / job).is_file()
