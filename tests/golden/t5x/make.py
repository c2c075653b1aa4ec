"""Makes checkpoints like those here: T5X's tiny models, trained a little, saved by T5X, packed.

  PYTHONPATH=T5X python tests/golden/t5x/make.py DIRECTORY

T5X is a checkout of google-research/t5x (an installed T5X has no examples/decoder_only), in an
environment as in docs/t5x.md. The weights are others than those here, and names of Orbax's files
differ from run to run.
"""

import io
import itertools
import lzma
import shutil
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import seqio
from t5x import adafactor, checkpoints, models, partitioning, trainer, utils
from t5x.examples.decoder_only import network as decoder_only
from t5x.examples.scalable_t5 import network as scalable
from t5x.examples.t5 import network as t5

STEPS = 5
SIZES = dict(
  vocab_size=384, emb_dim=32, num_heads=4, head_dim=8, mlp_dim=64,
  mlp_activations=('gelu', 'linear'), dropout_rate=0.0,
)  # fmt: skip
STACKS = {'num_encoder_layers': 2, 'num_decoder_layers': 2}
DECODER_ONLY = decoder_only.DecoderWrapper(
  decoder_only.TransformerConfig(**SIZES, num_layers=2, logits_via_embedding=True)
)
# Directory: (model, its layout, seed).
CHECKPOINTS = {
  'decoder_only_legacy': (DECODER_ONLY, 'legacy', 0),
  'decoder_only_orbax': (DECODER_ONLY, 'orbax', 1),
  't5_1_1_encdec_legacy': (t5.Transformer(t5.T5Config(**SIZES, **STACKS)), 'legacy', 2),
  't5_1_1_scalable_legacy': (
    scalable.Transformer(scalable.T5Config(**SIZES, **STACKS)),
    'legacy',
    3,
  ),
}


def examples(seed):
  """Two rows, the second padded: (inputs, targets, 1 in the prefix [2, 16]; of an encoder [2, 10]).

  Ids 3 to 258 are seqio's bytes.
  """
  rng = np.random.default_rng(seed)
  targets = rng.integers(3, 259, (2, 16), np.int32)
  targets[1, 12:] = 0
  inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  causal = np.repeat(np.arange(16)[None] < 6, 2, axis=0).astype(np.int32)
  encoder_input = rng.integers(3, 259, (2, 10), np.int32)
  encoder_input[1, 7:] = 0
  return inputs, targets, causal, encoder_input


def trained(module, seed):
  """(its train state after some steps of T5X's trainer, the partitioner)."""
  optimizer = adafactor.Adafactor(
    decay_rate=0.8, step_offset=0, logical_factor_rules=adafactor.standard_logical_factor_rules()
  )
  vocabulary = seqio.ByteVocabulary()
  if module is DECODER_ONLY:
    model = models.DecoderOnlyModel(module, vocabulary, optimizer)
  else:
    model = models.EncoderDecoderModel(module, vocabulary, vocabulary, optimizer)
  inputs, targets, _, encoder_input = examples(seed + 100)
  batch = {
    'decoder_input_tokens': inputs,
    'decoder_target_tokens': targets,
    'decoder_loss_weights': (targets > 0).astype(np.float32),
  }
  if module is not DECODER_ONLY:
    batch['encoder_input_tokens'] = encoder_input
  partitioner = partitioning.PjitPartitioner(num_partitions=1)
  initializer = utils.TrainStateInitializer(
    optimizer_def=optimizer,
    init_fn=model.get_initial_variables,
    input_shapes={name: x.shape for name, x in batch.items()},
    input_types={name: x.dtype for name, x in batch.items()},
    partitioner=partitioner,
  )
  train = trainer.Trainer(
    model=model,
    train_state=initializer.from_scratch(jax.random.key(seed)),
    partitioner=partitioner,
    eval_names=[],
    summary_dir=None,
    train_state_axes=initializer.train_state_axes,
    rng=jax.random.key(seed),
    learning_rate_fn=lambda step: 0.01,
    num_microbatches=None,
  )
  train.train(itertools.repeat(batch), STEPS)
  return train.train_state, partitioner


def save(state, partitioner, layout, directory):
  """The checkpoint, without the optimizer's arrays in the older layout."""
  parent = directory.parent / f'{directory.name}_all'
  parent.mkdir()
  if layout == 'legacy':
    checkpoints.Checkpointer(state, partitioner, parent).save(state)
    (parent / f'checkpoint_{STEPS}').rename(directory)
    for array in directory.glob('state.*'):
      shutil.rmtree(array)
  else:
    manager = checkpoints.OrbaxCheckpointManagerInterface(str(parent), state, partitioner)
    manager.save(state)
    manager.close()
    directory.mkdir()
    (parent / f'checkpoint_{STEPS}' / 'state').rename(directory / 'state')
  shutil.rmtree(parent)


def pack(directory):
  """DIRECTORY.tar.xz in its place; the same files make the same bytes."""
  packed = io.BytesIO()
  with tarfile.open(fileobj=packed, mode='w', format=tarfile.USTAR_FORMAT) as tar:
    for file in sorted(directory.rglob('*')):
      if file.is_file():
        info = tarfile.TarInfo(file.relative_to(directory.parent).as_posix())
        info.size = file.stat().st_size
        tar.addfile(info, io.BytesIO(file.read_bytes()))
  directory.with_name(f'{directory.name}.tar.xz').write_bytes(lzma.compress(packed.getvalue()))
  shutil.rmtree(directory)


def logits(name, module, params):
  """What T5X computes with a checkpoint, as a file has it; None for those without one."""
  inputs, targets, causal, encoder_input = examples(7)

  def apply(*args, **kwargs):
    kwargs |= {'enable_dropout': False, 'decode': False}
    return np.asarray(module.apply({'params': params}, *args, **kwargs))

  if name == 'decoder_only_legacy':
    return 'ref_decoder_only.npz', {
      'inputs': inputs,
      'targets': targets,
      'causal': causal,
      'logits': apply(inputs, targets),
      'logits_prefix': apply(inputs, targets, decoder_causal_attention=causal),
    }
  if name == 't5_1_1_encdec_legacy':
    return 'ref_t5_1_1_encdec.npz', {
      'encoder_input': encoder_input,
      'inputs': inputs,
      'targets': targets,
      'logits': apply(encoder_input, inputs, targets),
    }
  return None


def main(directory):
  directory.mkdir(parents=True)
  for name, (module, layout, seed) in CHECKPOINTS.items():
    state, partitioner = trained(module, seed)
    reference = logits(name, module, state.params)
    if reference is not None:
      np.savez(directory / reference[0], **reference[1])
    save(state, partitioner, layout, directory / name)
    pack(directory / name)


if __name__ == '__main__':
  main(Path(sys.argv[1]).absolute())
