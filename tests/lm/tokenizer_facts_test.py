"""What stands beside a language model: which tokens end its turn, and whether it is another one."""

import json

import pytest
import tokenizers

from ilm_jax.lm.huggingface_tokenizers import huggingface_tokenizer
from ilm_jax.lm.load import sampled_hash

SIZE = 8 << 20  # more than is read of a file


def test_a_chat_model_stops_where_its_generation_config_says(tmp_path):
  tokens = {'a': 0, '<eos>': 1, '<end_of_turn>': 2}
  tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, unk_token='a')).save(
    str(tmp_path / 'tokenizer.json')
  )
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<eos>'}))
  for ids, expected in (([1, 2], ('<eos>', '<end_of_turn>')), (2, ('<eos>', '<end_of_turn>'))):
    (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': ids}))
    found = huggingface_tokenizer(tmp_path)
    assert found is not None
    assert found[0].stop_tokens == expected


@pytest.mark.parametrize('place', [0, SIZE // 2, SIZE - 1])
def test_weights_that_were_trained_further_are_others(tmp_path, place):
  file = tmp_path / 'model.safetensors'
  file.write_bytes(bytes(SIZE))
  before = sampled_hash([file])
  with open(file, 'r+b') as f:
    f.seek(place)
    f.write(b'\1')
  assert sampled_hash([file]) != before
