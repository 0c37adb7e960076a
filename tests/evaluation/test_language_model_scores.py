"""VQAScore and HPSv3 at tiny size: the same classes and files as the published ones, with weights that are drawn."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from PIL import Image
from safetensors.torch import save_file

from lakonlab.evaluation.extractor import ExtractorPool
from lakonlab.evaluation.hpsv3 import REWARD_TOKEN, packaged_instruction, present_name, ranknet_head
from lakonlab.evaluation.hub_models import SETTING_SUFFIXES, digest_of
from lakonlab.evaluation.samples import SampleBatch
from lakonlab.evaluation.vqa_score import ANSWER, QUESTION, SYSTEM
from lakonlab.registry import METRICS
from tests.tiny_components import qwen_tokenizer, t5_tokenizer

PROMPTS = ['two red apples on a table', 'the sea', 'a photo of a brown bear at night']
INSTRUCTION = 'Say how good this is for {text_prompt}. Rate: ' + REWARD_TOKEN + '\nEND\n'
CHAT = (
    '{% for message in messages %}<|im_start|>{{ message["role"] }}\n{% for part in message["content"] %}'
    '{% if part["type"] == "image" %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part["text"] }}{% endif %}'
    '{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


def images(height=36, width=48):
    return torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(0))


def scored(kind, scorer, samples, prompts=PROMPTS, size=3):
    metric = METRICS.build(dict(type=kind, scorer=scorer))
    metric.bind(ExtractorPool())
    for start in range(0, len(samples), size):
        part = slice(start, start + size)
        metric.feed(SampleBatch(samples[part], list(range(len(samples)))[part], prompts=prompts[part]))
    return metric


@pytest.mark.parametrize(('kind', 'own'), [('VQAScore', 'ClipT5Scorer'), ('HPSv3', 'Qwen2VLReward')])
def test_a_scorer_that_is_named_is_taken(kind, own):
    assert METRICS.build(dict(type=kind)).scorer_config == dict(type=own)
    assert METRICS.build(dict(type=kind, scorer=dict(pixels=1))).scorer_config == dict(type=own, pixels=1)
    assert METRICS.build(dict(type=kind, scorer=dict(type='OpenClipScorer'))).scorer_config['type'] == 'OpenClipScorer'


@pytest.fixture(scope='module')
def clip_t5(tmp_path_factory):
    """A folder each of the model, of its tokenizer and of its vision model."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from lakonlab.evaluation.clip_t5 import ClipT5, ClipT5Config

    folder = tmp_path_factory.mktemp('vqa')
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    shape = dict(d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    net = ClipT5(ClipT5Config(vocab_size=len(tokenizer), mm_hidden_size=16, mm_vision_select_layer=-2, **shape))
    vision = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
                         image_size=28, patch_size=14)
    )  # fmt: skip
    with torch.no_grad():
        for parameter in (*net.parameters(), *vision.parameters()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    for name, part in (('net', net), ('tokenizer', tokenizer), ('vision', vision)):
        part.save_pretrained(folder / name)
    scorer = dict(weights=str(folder / 'net'), tokenizer=str(folder / 'tokenizer'), vision=str(folder / 'vision'))
    return dict(scorer, torch_dtype='float32'), net.eval(), tokenizer, vision.eval()


def test_vqa_score(clip_t5):
    scorer, net, tokenizer, vision = clip_t5
    samples = images()
    metric = scored('VQAScore', scorer, samples)
    expected = []
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    labels = torch.tensor([tokenizer(ANSWER).input_ids])
    for image, prompt in zip(samples, PROMPTS):
        square = torch.zeros(1, 3, 48, 48)
        square[0, :, 6:42] = (image - mean) / std
        pixels = F.interpolate(square, (28, 28), mode='bicubic', antialias=True)
        with torch.no_grad():
            states = vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            parts = [
                net.shared(torch.tensor([tokenizer(text).input_ids]))
                for text in (f'{SYSTEM} USER: ', f'\n{QUESTION.format(prompt)} ASSISTANT: ')
            ]
            inputs = torch.cat([parts[0], net.mm_projector(states), parts[1]], dim=1)
            expected.append((-net(inputs_embeds=inputs, labels=labels).loss).exp().item())
    assert metric._scores == pytest.approx(expected, rel=1e-4)
    assert len({round(value, 6) for value in expected}) == 3
    assert metric.compute()['vqascore'] == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert scored('VQAScore', scorer, samples, size=1)._scores == pytest.approx(expected, rel=1e-4)
    protocol = metric.protocol()['scorer']
    assert [len(digest) for digest in (*protocol['weights_sha256'], protocol['tokenizer_sha256'])] == [64] * 3


@pytest.mark.parametrize('shape', [(36, 48), (300, 200), (28, 28)])
def test_images_of_vqa_score_are_prepared_as_by_its_image_processor(clip_t5, shape):
    """Pictures on squares of the mean colour, through the image processor of CLIP in transformers."""
    from transformers import CLIPImageProcessor

    scorer, _, _, _ = clip_t5
    # of a middle range, because PIL clips what exceeds 8 bits after each direction, and tensors keep it
    pictures = np.random.RandomState(0).randint(60, 196, (2, *shape, 3), np.uint8)
    processor = CLIPImageProcessor(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28))
    side = max(shape)
    expected = []
    for picture in pictures:
        square = Image.new('RGB', (side, side), tuple(int(255 * value) for value in processor.image_mean))
        square.paste(Image.fromarray(picture), ((side - shape[1]) // 2, (side - shape[0]) // 2))
        expected.append(processor(square, return_tensors='pt')['pixel_values'][0])
    metric = METRICS.build(dict(type='VQAScore', scorer=scorer))
    metric.bind(ExtractorPool())
    found = metric.scorer.prepare(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
    # 8 bits after each direction, and of the colour of the border
    tolerance = 3.5 / 255 / metric.scorer.std
    assert ((found - torch.stack(expected)).abs() <= tolerance).all()


def test_weights_of_vqa_score_that_do_not_fit(clip_t5):
    scorer, _, _, _ = clip_t5
    with pytest.raises(ValueError, match=r'ClipT5Scorer\.weights=.*does not hold a ClipT5'):
        scored('VQAScore', dict(scorer, weights=scorer['vision']), images())
    with pytest.raises(ValueError, match=r'expected one {} in place of the prompt'):
        scored('VQAScore', dict(scorer, question='Is it good?'), images())


@pytest.fixture(scope='module')
def reward_model(tmp_path_factory):
    """Weights in one file, a folder with configuration and processor, and an instruction."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLImageProcessor,
        Qwen2VLModel,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    folder = tmp_path_factory.mktemp('hpsv3')
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    marks = ['<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>', '<|image_pad|>', '<|video_pad|>']
    tokenizer.add_special_tokens({'additional_special_tokens': marks})
    ids = dict(zip(marks, tokenizer.convert_tokens_to_ids(marks)))
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer) + 20, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, pad_token_id=tokenizer.pad_token_id,
            rope_parameters=dict(rope_type='default', rope_theta=10000.0, mrope_section=[2, 3, 3]),
        ),
        vision_config=dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2),
        image_token_id=ids['<|image_pad|>'], video_token_id=ids['<|video_pad|>'],
        vision_start_token_id=ids['<|vision_start|>'], vision_end_token_id=ids['<|vision_end|>'],
    )  # fmt: skip
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(), tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT,
    )  # fmt: skip
    config.save_pretrained(folder / 'base')
    processor.save_pretrained(folder / 'base')
    tokenizer.add_special_tokens({'additional_special_tokens': [*marks, REWARD_TOKEN]})
    net, head = Qwen2VLModel(config), ranknet_head(32)
    net.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        for parameter in (*net.parameters(), *head.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    older = {'visual.': 'visual.', 'language_model.': 'model.'}
    state = {f'rm_head.{name}': tensor for name, tensor in head.state_dict().items()}
    for name, tensor in net.state_dict().items():
        prefix = next(prefix for prefix in older if name.startswith(prefix))
        state[older[prefix] + name.removeprefix(prefix)] = tensor
    state['lm_head.weight'] = torch.zeros(len(tokenizer), 32)
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / 'hpsv3.safetensors')
    (folder / 'instruction.txt').write_text(INSTRUCTION)
    scorer = dict(
        weights=str(folder / 'hpsv3.safetensors'), base=str(folder / 'base'), torch_dtype='float32',
        instruction=str(folder / 'instruction.txt'), pixels=56 * 56,
    )  # fmt: skip
    return scorer, net.eval(), head.eval(), processor


def test_hpsv3(reward_model):
    scorer, net, head, processor = reward_model
    samples = (images() * 255).round() / 255
    metric = scored('HPSv3', scorer, samples)
    processor.image_processor.size = {'shortest_edge': 56 * 56, 'longest_edge': 56 * 56}
    expected = []
    for image, prompt in zip(samples, PROMPTS):
        content = f'<|vision_start|><|image_pad|><|vision_end|>{INSTRUCTION.format(text_prompt=prompt)}'
        text = f'<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n'
        picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
        inputs = processor(text=[text], images=[picture], return_tensors='pt')
        place = inputs['input_ids'][0].tolist().index(processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN))
        with torch.no_grad():
            expected.append(head(net(**inputs).last_hidden_state[0, place])[0].item())
    assert metric._scores == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in expected}) == 3
    assert scored('HPSv3', scorer, samples, size=1)._scores == pytest.approx(expected, abs=1e-5)
    assert metric.compute()['hpsv3'] == pytest.approx(sum(expected) / 3, abs=1e-5)
    protocol = metric.protocol()['scorer']
    assert protocol['pixels'] == 56 * 56
    assert protocol['instruction_sha256'] == hashlib.sha256(INSTRUCTION.encode()).hexdigest()
    assert len(protocol['base_sha256']) == 64


def test_digest_of_a_repository_is_that_of_its_files(tmp_path, monkeypatch):
    repository = tmp_path / 'hub' / 'models--some--model'
    snapshot, folder = repository / 'snapshots' / ('a' * 40), tmp_path / 'folder'
    for place in (snapshot, folder):
        place.mkdir(parents=True)
        (place / 'model.safetensors').write_bytes(b'weights')
        (place / 'config.json').write_text('{}')
    (repository / 'refs').mkdir()
    (repository / 'refs' / 'main').write_text('a' * 40)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    assert digest_of('some/model') == digest_of(str(folder))
    assert digest_of('some/model', None, SETTING_SUFFIXES) == digest_of(str(folder), None, SETTING_SUFFIXES)
    (folder / 'model.safetensors').write_bytes(b'others')
    assert digest_of('some/model') != digest_of(str(folder))
    (folder / 'model.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='no files that end in'):
        digest_of(str(folder))


def test_names_of_several_versions():
    for name in ('visual.patch_embed.proj.weight', 'model.visual.patch_embed.proj.weight'):
        assert present_name(name) == 'visual.patch_embed.proj.weight'
    for name in ('model.layers.0.mlp.up_proj.weight', 'model.language_model.layers.0.mlp.up_proj.weight'):
        assert present_name(name) == 'language_model.layers.0.mlp.up_proj.weight'


def test_what_does_not_fit(reward_model, tmp_path, monkeypatch):
    scorer, _, _, _ = reward_model
    save_file({'rm_head.0.weight': torch.zeros(2)}, tmp_path / 'other.safetensors')
    with pytest.raises(ValueError, match=r'Qwen2VLReward\.weights: .* does not hold this model'):
        scored('HPSv3', dict(scorer, weights=str(tmp_path / 'other.safetensors')), images())
    (tmp_path / 'instruction.txt').write_text('Rate {text_prompt}')
    with pytest.raises(ValueError, match=r'expected <\|Reward\|> in it, once'):
        scored('HPSv3', dict(scorer, instruction=str(tmp_path / 'instruction.txt')), images())
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ModuleNotFoundError, match='pip install --no-deps hpsv3'):
        packaged_instruction()


def test_the_instruction_is_read_from_the_package_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / 'hpsv3' / 'dataset'
    package.mkdir(parents=True)
    (tmp_path / 'hpsv3' / '__init__.py').write_text('raise ImportError("this must not run")')
    source = (
        'import not_there\nINSTRUCTION = """Look: {text_prompt}"""\nprompt_with_special_token = """ <|Reward|>"""\n'
    )
    (package / 'data_collator_qwen.py').write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert packaged_instruction() == 'Look: {text_prompt} <|Reward|>'
