"""Examples a second that phase 2 reads, against OpenP5's own data set class.

  git clone https://github.com/agiresearch/OpenP5
  OPENP5=OpenP5 python tests/benchmarks/bench.py --only input

OPENP5 names a checkout (7f110389cd5ab51820e29e94a44b6db83df243fb was measured); without it ours is
measured alone, with prompts of its own.

Both write OpenP5's prompts of MovieLens-100K (sequential and straightforward recommendation, items
and users by their numbers, histories of 20), tokenise them with SmolLM2's tokenizer, and give
padded batches of 64 rows. OpenP5's pipeline is what its training runs: its data set, sampler and
collator in a DataLoader without workers; it tokenises each batch as it comes, with a tokenizer that
is compiled and uses all cores. That it writes all prompts of an epoch before it begins, is not
counted. Ours tokenises entities and prompts once, and puts tokens together.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml100k
import numpy as np
from paired import Measured, Run, Side, compare
from table import Row, timed

BATCH = 64
HISTORY = 20
_BATCHES = {'ours': 256, 'peer': 32}  # a round
_LENGTHS = {'inputs': 448, 'targets': 64, 'entity_ids': 24}
_PACKED_LENGTHS = {'inputs': 1792, 'targets': 256, 'entity_ids': 168}
_DATASET = 'ML100K'


def ours(data: str, mixture: str, templates: str | None, pack: bool, soft_tokens: int) -> Run:
  from ilm_jax.data.input.feature_converter import ItemLMFeatureConverter
  from ilm_jax.data.input.reader import BatchReader, InputShards
  from ilm_jax.data.prepared_records import load_prepared
  from ilm_jax.lm.load import load_lm
  from ilm_jax.tasks import recommendation

  vocabulary = load_lm(ml100k.LM).vocabulary
  prepared = load_prepared(data)
  recommendation.register_recommendation_tasks(
    prepared,
    vocabulary,
    num_soft_tokens=soft_tokens,
    dataset=_DATASET,
    templates=templates or recommendation.TEMPLATES,
    history_length=HISTORY,
  )
  reader = BatchReader(
    f'{prepared.name}_{mixture}',
    task_feature_lengths=_PACKED_LENGTHS if pack else _LENGTHS,
    converter=ItemLMFeatureConverter(
      slot_id=vocabulary.slot_id,
      num_soft_tokens=soft_tokens,
      bos_id=vocabulary.bos_id,
      pack=pack,
      apply_length_check=False,  # the converter checks lengths itself
    ),
    shards=InputShards(batch_size=BATCH // 4 if pack else BATCH),
    seed=0,
  )

  def run() -> dict[str, float]:
    examples, tokens, filled = 0, 0, []
    while examples < _BATCHES['ours'] * BATCH:
      batch = next(reader)
      segments = batch.get('decoder_segment_ids')
      examples += BATCH if segments is None else int(segments.max(axis=1).sum())
      targets = batch['decoder_target_tokens']
      tokens += int(np.count_nonzero(targets))
      filled.append(np.mean((targets if segments is None else segments) != 0))
    return {'examples': examples, 'tokens': tokens / examples, 'filled': float(np.mean(filled))}

  return run


def peer(openp5: str, arrays: str, directory: str) -> Run:
  import argparse
  import sys
  from types import ModuleType

  import torch
  import transformers

  torch.set_num_threads(os.cpu_count() or 1)
  sys.path.insert(0, f'{openp5}/src/src_t5')
  # Imported for collaborative ids, which are not asked for.
  clusters = ModuleType('sklearn.cluster')
  vars(clusters)['SpectralClustering'] = None
  sys.modules |= {'sklearn': ModuleType('sklearn'), 'sklearn.cluster': clusters}
  from data.MultiTaskDataset import MultiTaskDataset  # pyright: ignore
  from processor.Collator import Collator  # pyright: ignore
  from processor.SingleMultiDataTaskSampler import SingleMultiDataTaskSampler  # pyright: ignore

  class Tokenizer(transformers.PreTrainedTokenizerFast):
    def batch_encode_plus(self, *args, **kwargs):  # its name before transformers 5
      return self(*args, **kwargs)

  found = np.load(arrays)
  tokenizer = Tokenizer(tokenizer_file=str(found['tokenizer']), pad_token='<|im_end|>')
  folder = Path(directory) / _DATASET
  folder.mkdir()
  histories = np.split(found['items'], found['offsets'][1:-1])
  lines = [
    ' '.join(map(str, [f'u{user}', *items, *held]))
    for user, (items, held) in enumerate(
      zip(histories, zip(found['validation_items'], found['test_items']))
    )
  ]
  (folder / 'user_sequence.txt').write_text('\n'.join(lines) + '\n')
  # As command/command_t5/ML100K_sequential.sh has it.
  parser = SingleMultiDataTaskSampler.parse_sampler_args(
    MultiTaskDataset.parse_dataset_args(argparse.ArgumentParser())
  )
  flags = {
    'data_path': directory,
    'datasets': _DATASET,
    'tasks': 'sequential,straightforward',
    'item_indexing': 'sequential',
    'prompt_file': f'{openp5}/prompt.txt',
    'sample_prompt': 1,
    'sample_num': '3,3',
    'max_his': HISTORY,
    'batch_size': BATCH,
  }
  options = parser.parse_args([f'--{name}={value}' for name, value in flags.items()])
  options.rank = options.distributed = 0
  examples = torch.utils.data.ConcatDataset([MultiTaskDataset(options, _DATASET, 'train')])
  sampler = SingleMultiDataTaskSampler(examples, BATCH, 0, shuffle=True)
  sampler.set_epoch(0)
  loader = iter(
    torch.utils.data.DataLoader(
      examples, sampler=sampler, batch_size=BATCH, collate_fn=Collator(tokenizer), shuffle=False
    )
  )

  def run() -> dict[str, float]:
    tokens = 0.0
    for _ in range(_BATCHES['peer']):
      _, input_mask, _, _, output_mask = next(loader)
      tokens += float(input_mask.sum() + output_mask.sum())
    count = _BATCHES['peer'] * BATCH
    return {'examples': count, 'tokens': tokens / count}

  return run


def rows(rounds: int, peaks: Mapping[str, float]) -> Iterator[Row]:
  del peaks
  openp5, data = os.environ.get('OPENP5'), str(ml100k.prepared())
  with tempfile.TemporaryDirectory() as directory:
    options = {'data': data, 'mixture': 'openp5_id', 'pack': False, 'soft_tokens': 0}
    options['templates'] = str(Path(openp5, 'prompt.txt').absolute()) if openp5 else None
    sides = {'ours': Side(__file__, 'ours', options)}
    if openp5:
      checkout = str(Path(openp5).absolute())
      others = {'openp5': checkout, 'arrays': str(ml100k.arrays()), 'directory': directory}
      sides['peer'] = Side(__file__, 'peer', others)
    found = compare(sides, rounds)
    name = f'input of phase 2: prompts of ML-100K, ids as text, rows of {BATCH}, padded'
    if openp5:
      # Ours has EOS after a target and begins with BOS, which SmolLM2's tokenizer adds to neither.
      tokens = [side.numbers['tokens'] for side in found.values()]
      assert abs(tokens[0] - tokens[1]) < 3, tokens
      note = f'against OpenP5; {tokens[0]:.0f} and {tokens[1]:.0f} tokens an example'
      row = timed(name, _for_each_example(found), goal=5, note=note)
      peer = 1 / row.peer if row.peer else None
      yield row._replace(unit='examples/s', ours=1 / row.ours, peer=peer)
    else:
      yield _alone(name, found, 'OPENP5 is not set: nothing to compare with')
    options = {'data': data, 'mixture': 'multitask_title', 'pack': True, 'soft_tokens': 4}
    found = compare({'ours': Side(__file__, 'ours', {**options, 'templates': None})}, rounds)
    name = f'input of phase 2: prompts of ML-100K, titles and 4 soft tokens, histories of {HISTORY}'
    filled = found['ours'].numbers['filled']
    note = f'OpenP5 has no such examples; {filled:.1%} of positions are filled'
    yield _alone(f'{name}, packed', found, note)


def _for_each_example(found: Mapping[str, Measured]) -> dict[str, Measured]:
  return {
    name: side._replace(seconds=[seconds / side.numbers['examples'] for seconds in side.seconds])
    for name, side in found.items()
  }


def _alone(name: str, found: Mapping[str, Measured], note: str) -> Row:
  return Row(name, 'examples/s', 1 / _for_each_example(found)['ours'].median, note=note)
