"""Sentence embeddings: what they mean, and that a text's does not depend on its company."""

import json
import subprocess
import sys

import numpy as np
import pytest

from ilm_jax.errors import UsageError
from ilm_jax.metrics.sentence_embedding import SentenceEmbedder

GUITAR, STRINGS, MARKET = (
  'A man is playing a guitar.',
  'Somebody plays a string instrument.',
  'The stock market fell sharply on Monday.',
)

CONFIG = {
  'num_hidden_layers': 1, 'hidden_size': 8, 'num_attention_heads': 2, 'intermediate_size': 16,
  'vocab_size': 10, 'max_position_embeddings': 8, 'layer_norm_eps': 1e-12,
}  # fmt: skip


@pytest.fixture(scope='module')
def embedder():
  return SentenceEmbedder.minilm()


@pytest.mark.network
def test_alike_texts_are_nearer_than_unrelated_ones(embedder):
  vectors = embedder.embed([GUITAR, STRINGS, MARKET])
  assert vectors.shape == (3, embedder.dim) == (3, 384)
  assert vectors.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
  similarity = vectors @ vectors.T
  assert similarity[0, 1] > 0.5
  assert np.abs(similarity[:2, 2]).max() < 0.2


@pytest.mark.network
def test_similarities_equal_those_of_transformers_as_recorded(embedder):
  """Computed like bert_parity_test's oracle, by transformers 5.24.0 and torch 2.13.0."""
  first, second, third = embedder.embed([GUITAR, STRINGS, MARKET])
  found = [first @ second, first @ third, second @ third]
  np.testing.assert_allclose(found, [0.669956, -0.061474, -0.057353], atol=1e-5)


@pytest.mark.network
def test_films_of_a_kind_are_nearest(embedder):
  texts = [
    'Toy Story (1995). Animation, Children, Comedy',
    'The Lion King (1994). Animation, Children, Musical',
    'Alien (1979). Horror, Science Fiction',
    'The Terminator (1984). Action, Science Fiction, Thriller',
  ]
  similarity = embedder.embed(texts) @ embedder.embed(texts).T - 2 * np.eye(4)
  assert similarity.argmax(axis=1).tolist() == [1, 0, 3, 2]


@pytest.mark.network
def test_vectors_depend_on_neither_order_nor_company(embedder):
  rng = np.random.default_rng(0)
  words = np.array(['film', 'about', 'space', 'love', 'a', 'robot', 'war', 'in', 'Paris'])
  texts = [' '.join(rng.choice(words, n)) for n in rng.integers(1, 40, 100)]
  vectors = embedder.embed(texts)
  order = rng.permutation(len(texts))
  np.testing.assert_allclose(embedder.embed([texts[i] for i in order]), vectors[order], atol=1e-6)
  for i in (0, 1, 99):
    np.testing.assert_allclose(embedder.embed([texts[i]]), vectors[i : i + 1], atol=1e-6)


@pytest.mark.network
def test_no_text_and_empty_text(embedder):
  assert embedder.embed([]).shape == (0, 384)
  vector = embedder.embed([''])
  assert np.isfinite(vector).all()
  np.testing.assert_allclose(np.linalg.norm(vector), 1, atol=1e-6)


@pytest.mark.network
def test_a_long_text_counts_up_to_256_tokens(embedder):
  # 254 words of one token each, between [CLS] and [SEP].
  kept = 'film ' * 254
  short, cut, other = embedder.embed([kept, kept + 'guitar ' * 500, 'film ' * 253 + 'guitar'])
  np.testing.assert_allclose(short, cut, atol=1e-6)
  assert np.abs(short - other).max() > 1e-3


def test_does_not_import_tensorflow():
  code = 'import sys, ilm_jax.metrics.sentence_embedding; sys.exit("tensorflow" in sys.modules)'
  subprocess.run([sys.executable, '-c', code], check=True)


def test_a_damaged_tokenizer_is_named(tmp_path):
  (tmp_path / 'model.safetensors').touch()
  (tmp_path / 'tokenizer.json').write_text('{}')
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
  with pytest.raises(UsageError, match=r'tokenizer.json: cannot be read as a tokenizer'):
    SentenceEmbedder(tmp_path)


def test_missing_files_are_named(tmp_path):
  (tmp_path / 'model.safetensors').touch()
  with pytest.raises(UsageError, match=r'no tokenizer.json beside .*model.safetensors'):
    SentenceEmbedder(tmp_path)
  (tmp_path / 'tokenizer.json').touch()
  with pytest.raises(UsageError, match=r'no config.json beside .*model.safetensors'):
    SentenceEmbedder(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps({'hidden_size': 8}))
  with pytest.raises(UsageError, match=r'has no num_hidden_layers, num_attention_heads'):
    SentenceEmbedder(tmp_path)
