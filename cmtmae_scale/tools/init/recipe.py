"""Write a commented recipe from the properties of images and of the machine.

Every rule is stated where it is applied. None was tuned: at their numbers of images the rules give
student, decoder, batch and learning rate of ``vit_base`` and ``tiny_imagenet``, and the length of
``vit_base``.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from cmtmae_scale.config.yaml_text import parse_yaml
from cmtmae_scale.runtime.log import escape_controls
from cmtmae_scale.tools.init.survey import Survey

SMALL_SIDE = 128
"""Median shorter side in pixels below which the student sees 64 pixels."""
MANY_IMAGES = 200_000
"""Images from which the student is ViT-B, not ViT-S, and begins with random weights."""
BATCHES_PER_EPOCH = 64
LARGEST_BATCH, USUAL_BATCH, FEWEST_BATCHES = 4096, 16, 4
SMALLEST_SET = USUAL_BATCH * FEWEST_BATCHES
"""Images from which a batch of the usual size leaves enough batches per epoch."""
MAX_EPOCHS = 800
"""As in MAE's longest pre-training."""
MAX_VIEWS = 400 * 1_281_167
"""Views of the recipe ``vit_base``, 400 epochs of ImageNet-1K."""
SHORT_RUN = 5000
"""Steps below which the EMA weights have a momentum of 0.99."""
DEMO_TEACHER = "datasets/demo/teacher.safetensors"
CLIP_MODEL, CLIP_TAG = "ViT-B-16-quickgelu", "openai"
TEACHERS = {
    CLIP_TAG: f"{{library: open_clip, model: {CLIP_MODEL}, weights: {CLIP_TAG}, quick_gelu: true}}",
    DEMO_TEACHER: "{library: timm, model: vit_small_patch14_dinov2, "
    f"weights: {DEMO_TEACHER}, depth: 10, feature: ln_post}}",
}
"""Group ``teacher`` by its weights."""

NO_DECODER = """\
# In short runs the teacher alone, without a decoder, learned better features at a third of the
# cost (docs/study.md, "What to use"); long runs are untested. In place of the decoder, these:
# decoder: {type: none}
# loss: {tokens: visible}
# collaboration: {alpha_attention: 1.0, alpha_target: 1.0}
"""


class Machine(NamedTuple):
    """Hardware of the run, and weights for it."""

    cores: int
    has_gpu: bool
    teacher: str | None
    """A key of ``TEACHERS`` whose weights are on this machine; ``None``: none is."""


class Sizes(NamedTuple):
    """Architecture and sizes that fit the images."""

    arch: str
    patch: int
    image: int
    decoder: str
    """Depth, width and heads, as YAML."""
    micro_batch: int
    """Views per forward, on a GPU."""
    start: str | None
    """timm's name of public weights that fit; ``None``: none are advised."""


TINY = Sizes("vit_tiny_patch16_224", 8, 64, "depth: 4, width: 192, heads: 6", 256, None)
SMALL = Sizes(
    "vit_small_patch16_224",
    16,
    224,
    "depth: 4, width: 256, heads: 8",
    128,
    "vit_small_patch16_224.dino",
)
BASE = Sizes("vit_base_patch16_224", 16, 224, "depth: 8, width: 512, heads: 16", 64, None)


def choose_sizes(survey: Survey) -> Sizes:
    """Choose the student by the size and the number of the images."""
    if survey.shorter_side < SMALL_SIDE:
        return TINY
    return BASE if survey.images >= MANY_IMAGES else SMALL


def choose_batch(images: int) -> int:
    """Return the largest power of two that leaves at least 64 batches per epoch, in [16, 4096].

    Of fewer than 64 images it is the largest that leaves at least 4; of fewer than 4 it is 1.
    """
    fewest = min(USUAL_BATCH, images // FEWEST_BATCHES)
    most = max(1, fewest, min(LARGEST_BATCH, images // BATCHES_PER_EPOCH))
    return 2 ** (most.bit_length() - 1)


def choose_epochs(images: int) -> int:
    """Return 800 epochs, or fewer if they would exceed ``MAX_VIEWS`` views."""
    return max(1, min(MAX_EPOCHS, MAX_VIEWS // images))


def choose_base_lr(batch: int) -> float:
    """Return the learning rate per 256 views.

    The shipped recipes have a learning rate of 1e-3 at batches of 64 and 256 and MAE's 1.5e-4 per
    256 views at 4096; the rule switches between them above 1024.
    """
    return 1.5e-4 if batch > 1024 else 1e-3 * 256 / batch


def write_text(survey: Survey, machine: Machine, name: str, output: Path) -> str:
    """Return the recipe as YAML with comments."""
    sizes, batch = choose_sizes(survey), choose_batch(survey.images)
    epochs = choose_epochs(survey.images)
    steps = math.ceil(epochs * survey.images / batch)  # as ``total_steps``
    base_lr = choose_base_lr(batch)
    grid = sizes.image // sizes.patch
    micro = min(batch, sizes.micro_batch if machine.has_gpu else 8)
    run_dir = f"runs/{name}"
    sections = [
        heading(survey, machine, output),
        f"""run:
  name: {quote(name)}
  output_dir: {quote(run_dir)}  # checkpoints and logs; the same command resumes
data:
  path: {quote(survey.path)}
  workers: {min(8, machine.cores)}  # threads or processes that read and decode, per rank
views:
  image_size: {sizes.image}  # {explain_size(survey)}
student:
  arch: {sizes.arch}
  patch_size: {sizes.patch}  # {grid} x {grid} patches; a teacher's grid follows
""",
        advise_start(survey, sizes),
        targets(sizes, machine, steps),
        f"""optimizer:
  base_lr: {base_lr:.3g}  # per 256 views: a learning rate of {base_lr * batch / 256:.2g}
train:
  # {explain_batch(survey.images, batch)}
  global_batch_size: {batch}
  micro_batch_size: {micro}  # views in memory at a time; the result does not depend on it
  # {explain_epochs(survey.images, epochs)}
  epochs: {epochs}  # {steps} steps
backend:
  precision: {"bf16" if machine.has_gpu else "fp32  # no GPU was found; bf16 with one"}
checkpoint:
  every: {min(500, max(1, steps // 10))}
""",
        evaluation(survey, run_dir, steps),
    ]
    return "".join(sections)


def heading(survey: Survey, machine: Machine, output: Path) -> str:
    """Return the first comments: findings, their meaning, and the commands."""
    labels = f"{survey.labels} labels" if survey.labels else "not all labelled"
    hardware = "a GPU" if machine.has_gpu else "no GPU"
    lines = [
        f"Purpose: pre-train on {survey.images} images of {quote(survey.path)} ({labels}); "
        "docs/own_images.md explains the choices.",
        "Source and deviations: written by cmtmae init; sizes follow from the images, nothing was "
        "tuned on them.",
        f"Hardware and cost: {hardware} and {machine.cores} CPU cores where it was written; not "
        "measured.",
    ]
    if not machine.has_gpu:
        lines.append(
            "A whole run needs a GPU; train.steps=20 run.output_dir=runs/trial shows within "
            "minutes that it works."
        )
    if survey.images < 1000:
        lines.append(
            f"{survey.images} images are too few to learn general features from: prefer public "
            "weights as they are."
        )
    if survey.excluded:
        first, why = survey.excluded[0]
        found = escape_controls(f"{quote(first)}, {one_line(why)}")  # names are any bytes
        lines.append(
            f"{len(survey.excluded)} images are excluded (first: {found}): see cmtmae check-data."
        )
    if survey.elongation > 3:
        lines.append(
            "Most images are more than three times as long as high, and a view is at most 4 : 3: "
            "cut them into pieces, so that a view shows one thing."
        )
    command = f"Command: cmtmae pretrain --config {quote(str(output))}"
    return "".join(f"# {line}\n" for line in [*lines, f"{command}  (--dry-run checks it first)"])


def explain_size(survey: Survey) -> str:
    """Return the reason for the image size."""
    side = survey.shorter_side
    found = f"the images' shorter sides have a median of {side} pixels"
    return f"{found}, below {SMALL_SIDE}" if side < SMALL_SIDE else found


def advise_start(survey: Survey, sizes: Sizes) -> str:
    """Return the comment about public weights as initialisation."""
    if survey.images >= MANY_IMAGES:
        return ""
    few = f"  # {survey.images} images are few: start from public weights rather than at random"
    if sizes.start is None:
        return f"{few}, if you have a file for this size.\n  # init_weights: FILE.safetensors\n"
    code = (
        f"import timm, safetensors.torch as s; m = timm.create_model('{sizes.start}', "
        "pretrained=True); s.save_file(m.state_dict(), 'start.safetensors')"
    )
    return f"""{few}.
  # Once, with internet: python -c "{code}"
  # init_weights: start.safetensors
"""


def targets(sizes: Sizes, machine: Machine, steps: int) -> str:
    """Return teacher, decoder, masks and losses: CMT-MAE with a teacher, else MAE."""
    prompt = f"decoder: {{type: prompt, {sizes.decoder}}}\n"
    if machine.teacher is not None:
        momentum = "momentum: {start: 0.99}  # for so short a run\n" if steps < SHORT_RUN else ""
        return (
            f"# The teacher's weights are on this machine: {machine.teacher}.\n"
            f"teacher: {TEACHERS[machine.teacher]}\n{prompt}{momentum}"
            "mask: {sampler: reveal_salient, ratio: 0.75}  # salient patches tend to stay visible\n"
            f"{NO_DECODER}"
        )
    return f"""# No teacher's weights are on this machine: MAE, which predicts the masked pixels.
teacher: {{mode: none}}
decoder: {{type: full, {sizes.decoder}}}
mask: {{sampler: random, ratio: 0.75}}
loss: {{tokens: masked, include_cls: false, teacher: 0.0, student: 0.0, pixel: 1.0}}
# CMT-MAE with CLIP as teacher (600 MB, downloaded at the first start; offline weights: FILE):
# in place of the four lines above, these two:
# teacher: {TEACHERS[CLIP_TAG]}
# {prompt}"""


def explain_batch(images: int, batch: int) -> str:
    """Return the reason for the batch size."""
    share = f"{images / batch:.3g} batches per epoch"
    if batch == LARGEST_BATCH:
        return f"{share}; larger batches are rarely used"
    if batch < USUAL_BATCH:
        return f"{share}: so few images allow no usual batch"
    if batch == USUAL_BATCH:
        return f"{share}; {USUAL_BATCH} is the smallest batch for {SMALLEST_SET} images or more"
    return f"{share}: a power of two that leaves at least {BATCHES_PER_EPOCH}"


def explain_epochs(images: int, epochs: int) -> str:
    """Return the reason for the number of epochs."""
    if epochs == MAX_EPOCHS:
        return f"{MAX_EPOCHS} epochs, as MAE's longest on ImageNet-1K"
    return f"{epochs * images / 1e6:.0f} million views, at most as vit_base.yaml"


def evaluation(survey: Survey, run_dir: str, steps: int) -> str:
    """Return the group ``eval`` where there is a labelled test set, else how to evaluate."""
    if survey.test_path is not None:
        return f"""eval:
  every: {max(1, steps // 10)}  # k-NN and a linear probe; costs a pass over both sets
  train_path: {quote(survey.path)}
  test_path: {quote(survey.test_path)}
"""
    if survey.labels:
        return (
            "# Labels were found. After training, k-NN on a fifth of the images, with the labels\n"
            "# of the rest (pre-training has seen the pixels of all):\n"
            f"#   cmtmae evaluate knn --checkpoint {quote(run_dir)} --train {quote(survey.path)} "
            "--split 0.8\n"
        )
    return "# Without labels nothing is evaluated; eval.train_path and eval.test_path name some.\n"


def quote(text: str) -> str:
    """Return a text as YAML on one line, in quotes where YAML would read something else."""
    if re.fullmatch(r"[\w./-]+", text, re.ASCII) and parse_yaml(text) == text:
        return text
    return json.dumps(text, ensure_ascii=False)


def one_line(text: str) -> str:
    """Return a text without line breaks, for a comment."""
    return " ".join(text.split())
