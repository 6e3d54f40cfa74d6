"""All prompt templates, and how a subject is put into one."""

from __future__ import annotations

import re
from collections.abc import Sequence

# For photos of the subject. Neutral and varied, so that the model attaches what the photos share to the subject.
TEMPLATES = (
    "a photo of a {}",
    "a photo of the {}",
    "a photo of one {}",
    "a photo of my {}",
    "a picture of a {}",
    "a picture of the {}",
    "an image of a {}",
    "a snapshot of the {}",
    "a good photo of a {}",
    "a good photo of the {}",
    "a nice photo of the {}",
    "a cool photo of the {}",
    "a clean photo of a {}",
    "a bright photo of a {}",
    "a bright photo of the {}",
    "a dark photo of the {}",
    "a detailed photo of a {}",
    "a cropped photo of a {}",
    "a cropped photo of the {}",
    "a close-up photo of a {}",
    "a close-up photo of the {}",
    "a rendering of a {}",
    "a rendition of the {}",
    "a depiction of a {}",
)
# For augmented views whose framing is added to the prompt: without the templates that state a framing themselves.
UNFRAMED_TEMPLATES = tuple(text for text in TEMPLATES if "cropped" not in text and "close-up" not in text)
# For images that no photo shows: what the student is asked to generate in training. Without the places that the toy
# benchmark asks for (snow, jungle, city, pink fabric, purple rug, water, a mountain behind), so that they stay unseen.
SCENES = (
    "a {} on a windowsill",
    "a {} on a sandy beach at noon",
    "a {} in a cardboard box",
    "a {} on a wooden floor",
    "a {} on a tiled floor",
    "a {} on a stack of books",
    "a {} on a wicker chair",
    "a {} on a picnic blanket",
    "a {} on a brick street",
    "a {} on a white background",
    "a {} on a black background",
    "a {} on a blue tablecloth",
    "a {} in a green meadow",
    "a {} in a wheat field at sunset",
    "a {} among autumn leaves",
    "a {} beside a lake in the morning mist",
    "a {} at the foot of a waterfall",
    "a {} on a rock by the sea",
    "a {} in the desert under a clear sky",
    "a {} under cherry blossoms",
    "a {} in a garden full of flowers",
    "a {} on a park bench",
    "a {} on a stone staircase",
    "a {} in front of a red brick wall",
    "a {} in front of a yellow door",
    "a {} on a marble table",
    "a {} on a kitchen counter",
    "a {} on a bookshelf",
    "a {} on a grey sofa by a window",
    "a {} on a straw mat",
    "a {} on a metal workbench",
    "a {} on wet asphalt in the rain",
    "a {} in a subway station",
    "a {} in a museum hall",
    "a {} on a market stall",
    "a {} next to a campfire at dusk",
    "a {} seen from above",
    "a {} seen from the side",
    "a {} in soft studio light",
    "a {} in dramatic evening light",
)

# For evaluation without --prompts. Not DreamBench's, but like them: places, surfaces, colors, sizes.
EVALUATION_TEMPLATES = (
    *("a photo of a {}", "a {} on a sandy beach", "a {} in deep snow", "a {} in a dense forest"),
    *("a {} on a city street at night", "a {} in a kitchen", "a {} on a wooden table", "a {} on a red carpet"),
    *("a {} in front of a lake and mountains", "a {} in a field of yellow flowers", "a {} in the rain", "a tiny {}"),
    *("a huge {} seen from below", "a blue {}", "a golden {}", "a black and white photo of a {}"),
)


def scene_prompt(subject: str, index: int, scenes: Sequence[str] = ()) -> str:
    """Return a prompt for a scene with the subject.

    Args:
        subject: such as "sks dog".
        index: number of the scene; counts past the end start over.
        scenes: templates; the built-in `SCENES` if empty.
    """
    scenes = scenes or SCENES
    return with_subject(scenes[index % len(scenes)], subject)


def with_subject(template: str, subject: str) -> str:
    """Return the template with `{}` replaced by the subject; "a {}" becomes "an owl" before a vowel sound."""
    # Exceptions that begin with the sound of "you" or "one": a unicorn, a European, a used car, a one-eyed cat.
    vowel = re.match(r"(?!uni[^mn]|eu|us[eu]|one\b)[aeiou]", subject, re.IGNORECASE)
    article = r"\1n {}" if vowel else r"\1 {}"
    return re.sub(r"\b([aA]) \{\}", article, template).replace("{}", subject)


def with_class(prompt: str, subject: str, class_name: str) -> str:
    """Return the prompt about the class instead of the subject: "a sks owl" becomes "an owl".

    Args:
        prompt: of the subject.
        subject: such as "sks owl".
        class_name: such as "owl".
    """
    words = rf"(\b[aA]n? )?(?<!\w){re.escape(subject)}(?!\w)"
    return re.sub(words, lambda match: with_subject(f"{match[1][0]} {{}}" if match[1] else "{}", class_name), prompt)


def class_prompts(
    class_name: str, count: int, *, templates: Sequence[str] = (), scenes: Sequence[str] = ()
) -> list[str]:
    """Return prompts for the class, without the token.

    Args:
        class_name: such as "dog".
        count: number of prompts.
        templates: used in turn; if empty, `TEMPLATES` and scenes alternate.
        scenes: as in `scene_prompt`.
    """
    if templates:
        return [scene_prompt(class_name, index, templates) for index in range(count)]
    plain = [with_subject(TEMPLATES[index % len(TEMPLATES)], class_name) for index in range(count)]
    in_scenes = [scene_prompt(class_name, index, scenes) for index in range(count)]
    return [text for both in zip(plain, in_scenes, strict=True) for text in both][:count]


def fill(template: str, subject: str) -> str:
    """Return the template with `{}` and `{subject}` replaced by the subject, the article unchanged."""
    return template.replace("{subject}", subject).replace("{}", subject)
