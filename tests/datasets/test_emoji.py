"""Emoji: pictures as another program draws them, names as Unicode gives them."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont, features

from lakonlab.datasets.emoji import FONT_PATH, Emoji
from lakonlab.datasets.emoji_font import EmojiFont, on_background, read_names
from lakonlab.registry import DATASETS
from tests.debian_packages import needs

HERE = needs('fonts-noto-color-emoji', 'unicode-data')
LIST = """# emoji-test.txt
# group: Smileys & Emotion
# subgroup: face-smiling
1F600                                      ; fully-qualified     # X E1.0 grinning face
263A                                       ; unqualified         # X E0.6 smiling face
263A FE0F                                  ; fully-qualified     # X E0.6 smiling face
# group: People & Body
# subgroup: hand-fingers-open
1F44B 1F3FD                                ; fully-qualified     # X E1.0 waving hand: medium skin tone
"""


def test_the_list_of_names():
    names = read_names(LIST, 'list')
    assert [name.name for name in names] == ['grinning face', 'smiling face', 'waving hand: medium skin tone']
    assert [name.code_points for name in names] == [(0x1F600,), (0x263A, 0xFE0F), (0x1F44B, 0x1F3FD)]
    assert names[0].group == 'Smileys & Emotion'
    assert names[2].subgroup == 'hand-fingers-open'
    assert [name.has_skin_tone for name in names] == [False, False, True]
    with pytest.raises(ValueError, match='list: there is no line'):
        read_names('# nothing', 'list')


@pytest.fixture(scope='module')
def fruit():
    return DATASETS.build(dict(type='Emoji', subgroups=['food-fruit'], image_size=24))


@HERE
def test_pictures_with_captions(fruit):
    names = [fruit[i]['name'] for i in range(len(fruit))]
    assert len(set(names)) == len(names) == 19
    assert {'grapes', 'banana', 'red apple'} <= set(names)
    item = fruit[names.index('banana')]
    assert item['prompt_kwargs'] == {'prompt': 'banana'}
    assert item['negative_prompt_kwargs'] == {'prompt': ''}
    assert item['images'].shape == (3, 24, 24)
    assert item['images'].dtype == torch.float32
    # on white, and of the colour that the name promises
    assert item['images'][:, 0, 0].min() > 0.95
    inside = item['images'][:, item['images'].min(dim=0).values < 0.6]
    assert inside.shape[1] > 20
    assert inside[0].mean() > inside[2].mean() + 0.2
    assert inside[1].mean() > inside[2].mean() + 0.2
    with pytest.raises(IndexError, match='Emoji data set of 19'):
        fruit[19]


@HERE
@pytest.mark.skipif(not features.check('freetype2'), reason='PIL is built without FreeType')
@pytest.mark.parametrize('code', [0x1F34C, 0x1F600, 0x1F431])
def test_pictures_are_those_that_freetype_draws(code):
    font = ImageFont.truetype(FONT_PATH, 109)  # the size of its bitmaps
    drawn = Image.new('RGBA', (136, 128), (0, 0, 0, 0))
    left, top, *_ = font.getbbox(chr(code))
    ImageDraw.Draw(drawn).text((-left, -top), chr(code), font=font, embedded_color=True)
    with Image.open(io.BytesIO(EmojiFont(FONT_PATH).picture([code]))) as file:
        ours = np.asarray(file.convert('RGBA')).astype(int)
    theirs = np.asarray(drawn).astype(int)
    opaque = (ours[..., 3] == 255) & (theirs[..., 3] == 255)
    assert opaque.mean() > 0.2
    assert np.abs(ours[opaque] - theirs[opaque]).max() <= 2


@HERE
def test_sequences_and_flags_are_single_pictures():
    font = EmojiFont(FONT_PATH)
    family, cat, flag = [0x1F468, 0x200D, 0x1F466], [0x1F408, 0x200D, 0x2B1B], [0x1F1E9, 0x1F1EA]
    pictures = [font.picture(codes) for codes in (family, cat, flag)]
    assert len(set(pictures)) == 3
    assert font.picture(cat) != font.picture(cat[:1])
    assert font.picture([0x263A, 0xFE0F]) == font.picture([0x263A])  # the selector asks for colour, which this is
    assert font.picture([0x1F408, 0x200D, 0x1F600]) is None
    assert font.picture([0xE000]) is None


@HERE
def test_choices():
    faces = Emoji(groups=['Smileys & Emotion'], image_size=8)
    both = Emoji(groups=['Smileys & Emotion'], subgroups=['face-smiling', 'food-fruit'], image_size=8)
    assert 10 < len(both) < len(faces)
    hands = [Emoji(subgroups=['hand-fingers-open'], image_size=8, skin_tones=tones) for tones in (False, True)]
    assert len(hands[1]) == 6 * len(hands[0])
    with pytest.raises(ValueError, match=r"groups: found 'Fruit', expected some of 'Activities', 'Animals & Nature'"):
        len(Emoji(groups=['Fruit']))
    with pytest.raises(ValueError, match='there is no emoji in both'):
        len(Emoji(groups=['Flags'], subgroups=['food-fruit']))


@HERE
def test_sampling(fruit):
    data = Emoji(subgroups=['food-fruit'], image_size=24, test_mode=True, num_test_images=40, negative_prompt=None)
    assert len(data) == 40
    item = pickle.loads(pickle.dumps(data))[20]
    assert item['name'] == fruit[1]['name']
    assert torch.equal(item['noise'], torch.randn((3, 24, 24), generator=torch.Generator().manual_seed(20)))
    assert 'images' not in item
    assert 'negative_prompt_kwargs' not in item
    assert len(Emoji(subgroups=['food-fruit'], test_mode=True)) == 19


def test_a_glyph_stands_in_the_middle_of_its_background():
    file = io.BytesIO()
    Image.new('RGBA', (8, 4), (255, 0, 0, 255)).save(file, 'PNG')
    pixels = np.asarray(on_background(file.getvalue(), 8, 'blue'))
    assert (pixels[2:6] == [255, 0, 0]).all()
    assert (pixels[[0, 1, 6, 7]] == [0, 0, 255]).all()


def test_missing_files_name_their_packages(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'names_path=.*apt-get install unicode-data'):
        len(Emoji(names_path=str(tmp_path / 'none.txt')))
    (tmp_path / 'names.txt').write_text(LIST)
    arguments = dict(names_path=str(tmp_path / 'names.txt'), font_path=str(tmp_path / 'none.ttf'))
    with pytest.raises(FileNotFoundError, match=r'font_path=.*apt-get install fonts-noto-color-emoji'):
        len(Emoji(**arguments))
    (tmp_path / 'none.ttf').write_bytes(b'no font')
    with pytest.raises(ValueError, match=r'none\.ttf: is no font'):
        len(Emoji(**arguments))


@pytest.mark.parametrize('arguments', [dict(image_size=0), dict(num_test_images=0)])
def test_wrong_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Emoji(**arguments)
