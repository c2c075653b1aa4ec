"""Throughput of the phase-2 input pipeline: examples a second, uncached, as training reads them.

  python tests/benchmarks/input_pipeline.py [--data=DIR] [--seconds=10]

Reads the multitask mixture of a prepared data set (ML-100K by default, prepared on first use) in
title form with histories of 20, once with rows padded and once packed, and prints the median and
the range over rounds. One process, whatever cores the machine has.
"""

import argparse
import statistics
import tempfile
import time

import numpy as np

LENGTHS = {'inputs': 448, 'targets': 64, 'entity_ids': 24}
PACKED_LENGTHS = {'inputs': 1792, 'targets': 256, 'entity_ids': 168}


def tokenizer_file(prepared, directory: str) -> str:
  """Trains a byte-level BPE of a small LM's kind on the catalogue's titles."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=8000,
    special_tokens=['<pad>', '<s>', '</s>', '<slot>'],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(prepared.item_text['title'], trainer)
  path = f'{directory}/tokenizer.json'
  tokenizer.save(path)
  return path


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', default='runs/demo/ml100k')
  parser.add_argument('--seconds', type=float, default=10.0)
  parser.add_argument('--rounds', type=int, default=3)
  arguments = parser.parse_args()

  from ilm_jax.data.feature_converter import ItemLMFeatureConverter
  from ilm_jax.data.prepared import load_prepared
  from ilm_jax.data.reader import BatchReader, InputShards
  from ilm_jax.data.vocabularies import HuggingFaceVocabulary
  from ilm_jax.tasks import recommendation

  prepared = load_prepared(arguments.data)
  with tempfile.TemporaryDirectory() as directory:
    vocabulary = HuggingFaceVocabulary(tokenizer_file(prepared, directory), slot_token='<slot>')
    started = time.perf_counter()
    recommendation.register_recommendation_tasks(prepared, vocabulary, num_soft_tokens=4)
    print(f'registered (all texts tokenised) in {time.perf_counter() - started:.2f} s')
    for pack in (False, True):
      converter = ItemLMFeatureConverter(
        slot_id=vocabulary.slot_id,
        num_soft_tokens=4,
        bos_id=vocabulary.bos_id,
        pack=pack,
        apply_length_check=False,  # the converter checks lengths itself
      )
      started = time.perf_counter()
      reader = BatchReader(
        f'{prepared.name}_multitask_title',
        task_feature_lengths=PACKED_LENGTHS if pack else LENGTHS,
        converter=converter,
        shards=InputShards(batch_size=16 if pack else 64),
        seed=0,
      )
      batch = next(reader)
      startup = time.perf_counter() - started
      rates, filled = [], []
      for _ in range(arguments.rounds):
        examples, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < arguments.seconds:
          batch = next(reader)
          if pack:
            examples += int(batch['decoder_segment_ids'].max(axis=1).sum())
            filled.append(float(np.mean(batch['decoder_segment_ids'] > 0)))
          else:
            examples += len(batch['entity_ids'])
            filled.append(float(np.mean(batch['decoder_target_tokens'] != 0)))
        rates.append(examples / elapsed)
      print(
        f'{"packed" if pack else "padded"}: {statistics.median(rates):,.0f} examples/s'
        f' ({min(rates):,.0f}-{max(rates):,.0f} over {len(rates)} rounds of'
        f' {arguments.seconds:g} s), {np.mean(filled):.1%} of positions filled, first batch after'
        f' {startup:.1f} s'
      )


if __name__ == '__main__':
  main()
