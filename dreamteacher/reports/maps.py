"""The report's pictures: feature maps of teacher, regressor and backbone, and samples of the teacher."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dreamteacher import metrics
from dreamteacher.data.images import BadImageError, read_image, to_float
from dreamteacher.data.layouts.table import image_files, layout_of
from dreamteacher.losses import whiten
from dreamteacher.models.regressor import FeatureRegressor
from dreamteacher.models.student import create_student, read_weights
from dreamteacher.reports.charts import pca_basis, pca_colours
from dreamteacher.runtime import checkpoint
from dreamteacher.runtime.distributed.device import pick_device
from dreamteacher.runtime.download.objects import address_of
from dreamteacher.runtime.errors import UserError
from dreamteacher.runtime.page import data_uri
from dreamteacher.spec import FeatureSpec
from dreamteacher.teachers.base import Teacher
from dreamteacher.teachers.registry import fingerprint, is_python, load_teacher, teacher_folder

_SAMPLES, _SAMPLING_STEPS, _PATIENCE = 16, 25, 120.0
MAPS_LEAD = (
    "The first three principal components of a level's features as red, green and blue. Teacher and "
    "regressor share one basis and one range, fitted on the teacher's whitened maps: equal colours mean "
    "equal features. Where the regressor is paler it predicts less: it has not learned that, or it comes "
    "from the noise that the teacher was given. The backbone, which is what is kept, has a basis of its own."
)


@torch.no_grad()
def feature_maps(run: Path, facts: Mapping[str, Any], count: int, own_code: bool = False) -> str:
    """Up to `count` of a pretraining's images, and their maps at every level, as HTML.

    Args:
        run: its folder, with weights; facts: its config.json.
        own_code: whether a teacher that is a Python file may be run.

    Raises:
        UserError: when images, teacher or weights are not there or not those of the run.
    """
    config = as_dict(facts.get("config"))
    device = pick_device("auto")
    teacher = _teacher(facts, own_code).to(device)
    student = create_student(str(config["student"])).to(device).eval()
    regressor = FeatureRegressor(student.specs, teacher.specs, width=int(config["width"])).to(device).eval()
    weights, source = _trained(run)
    checkpoint.load_exactly(student.model, checkpoint.under("student.model.", weights), source)
    checkpoint.load_exactly(regressor, checkpoint.under("regressor.", weights), source)
    generator = torch.Generator(device).manual_seed(0)
    if "encode" in teacher.modes and config.get("images"):
        images = _pick_images(facts, count)
        x = to_float(images).to(device)
        targets = [m.float() for m in teacher.encode(x, generator=generator)]
    else:  # on images of the teacher's own
        x, maps = teacher.sample(count, generator=generator)
        images, targets = (x * 255).round().to(torch.uint8).cpu(), [m.float() for m in maps]
    backbone = student(x)
    outputs = regressor(backbone, [(m.shape[-2], m.shape[-1]) for m in targets])
    cells = _strip("image", images, "image", kind="photo")
    for i, spec in enumerate(teacher.specs):
        target = whiten(targets[i], config.get("whiten", "chw"))
        cells += _level(spec, target, outputs[i], backbone[min(regressor.sources[i], len(backbone) - 1)])
    return f'<div class="card scroll"><div class="maps" style="--n:{len(images)}">{cells}</div></div>'


def _level(spec: FeatureSpec, target: Tensor, output: Tensor, features: Tensor) -> str:
    """Three rows of maps: the whitened teacher and the regressor in one basis, the backbone in its own."""
    name, basis = stride_name(spec.name), pca_basis(target)
    facts = (
        f"{target.shape[-2]} × {target.shape[-1]} positions, {spec.channels} channels of the teacher, "
        f"{features.shape[1]} of the backbone · on these images R² {metrics.r2(output, target):.2f}, cosine "
        f"{metrics.cosine(output, target):.2f}"
    )
    return (
        f"<strong>{name}<small>{facts}</small></strong>"
        + _strip("teacher", pca_colours(target, basis), f"teacher, {name}")
        + _strip("regressor", pca_colours(output, basis), f"regressor, {name}")
        + _strip("backbone", pca_colours(features, pca_basis(features)), f"backbone, {name}")
    )


def _strip(label: str, images: Tensor, what: str, *, kind: str = "map") -> str:
    """A row of images uint8 N x 3 x H x W; maps keep their resolution, the browser enlarges them."""
    cells = (
        f'<img class="{kind}" src="{data_uri(image, 256)}" alt="{what} {i + 1}">'
        for i, image in enumerate(images)
    )
    return f"<span>{label}</span>{''.join(cells)}\n"


def _pick_images(facts: Mapping[str, Any], count: int) -> Tensor:
    """`count` readable images at even distances in the run's folder, uint8 N x 3 x H x W."""
    config = as_dict(facts.get("config"))
    height, width = as_dict(facts.get("data")).get("size") or config["size"]
    layout = layout_of(Path(config["images"]))
    if layout is not None and (address_of(layout[1]) or (layout[0] == "hf" and not layout[1].exists())):
        raise UserError("A page about a run downloads nothing, such as the run's images.", "")
    paths = image_files(Path(config["images"])).paths
    found: list[Tensor] = []
    for i in range(min(count, len(paths))):
        first = i * len(paths) // min(count, len(paths))
        for path in paths[first : first + 8]:  # a damaged one gives way to its neighbour
            try:
                found.append(read_image(path, (height, width)))
                break
            except BadImageError:
                continue
    if not found:
        raise UserError(f"No image in '{config['images']}' can be read.", "")
    return torch.stack(found)


def _teacher(facts: Mapping[str, Any], own_code: bool) -> Teacher:
    """The run's teacher, as it was: same timesteps, same noise, and the same weights."""
    config, card = as_dict(facts.get("config")), as_dict(facts.get("teacher"))
    name, wanted = str(config["teacher"]), card.get("sha256")
    if is_python(name) and not own_code:
        raise UserError(
            f"The teacher is the Python file '{name}', and a page about a run executes no code that the run names.",
            "For a run of your own: dreamteacher report --own-code.",
        )
    if wanted and fingerprint(name) != wanted:
        raise UserError(f"The teacher in '{name}' is no longer the one of this run (sha256 differs).", "")
    timesteps = tuple(card.get("t") or config.get("t") or ())
    return load_teacher(
        name, timesteps=timesteps, noise=config.get("noise", "stochastic"), psi=config.get("psi", 1.0)
    )


def _trained(run: Path) -> tuple[dict[str, Tensor], Path]:
    """student.model.* and regressor.* tensors: the exported ones, else the newest checkpoint's."""
    files = {"student.model.": run / "backbone.safetensors", "regressor.": run / "regressor.safetensors"}
    if all(path.is_file() for path in files.values()):
        tensors = {p + k: v for p, path in files.items() for k, v in read_weights(path).tensors.items()}
        return tensors, files["student.model."]
    newest = checkpoint.latest(run)
    if newest is None:
        raise UserError("The run has no weights yet.", "They come with its first checkpoint.")
    tensors, _ = checkpoint.load(newest)
    return checkpoint.under("ema/", tensors) or checkpoint.under("network/", tensors), newest


def teacher_samples(run: Path, facts: Mapping[str, Any], own_code: bool = False) -> str:
    """The sample sheet that lies beside the teacher's weights; without one, new samples if they are cheap.

    Args:
        run: folder of a teacher's training, or of a pretraining; facts: its config.json.
        own_code: whether a teacher that is a Python file may be run.

    Raises:
        UserError: when the teacher is not there or not that of the run, or too slow to sample.
    """
    from torchvision.transforms.v2.functional import pil_to_tensor
    from torchvision.utils import make_grid

    config, is_teacher = as_dict(facts.get("config")), facts.get("verb") == "train-teacher"
    if not is_teacher and not config.get("teacher"):
        return ""
    name = str(config.get("teacher"))
    folder = run if is_teacher else None if is_python(name) else teacher_folder(name)
    if folder and (folder / "samples.png").is_file():
        with Image.open(folder / "samples.png") as file:
            sheet = pil_to_tensor(file.convert("RGB"))
        what = "Images that the teacher made from noise: what it knows is what the student can learn from it."
    elif is_teacher:
        return '<p class="note">No samples.png yet: it comes with the first validation.</p>'
    else:
        sheet = make_grid(_generate(_teacher(facts, own_code)).cpu(), nrow=8, padding=2, pad_value=1.0)
        sheet = (sheet.clamp(0, 1) * 255).round().to(torch.uint8)
        what = f"{_SAMPLES} images that the teacher made from noise, in few steps: its best are better."
    picture = f'<img src="{data_uri(sheet, 1100)}" alt="samples of the teacher">'
    return f'<figure class="card sheet">{picture}<figcaption>{what}</figcaption></figure>'


def _generate(teacher: Teacher) -> Tensor:
    """New images, float RGB in [0, 1]; a UserError where they would take more than `_PATIENCE` seconds."""
    from dreamteacher.teachers.diffusion.teacher import DiffusionTeacher

    device = pick_device("auto")
    generator = torch.Generator(device).manual_seed(0)
    teacher = teacher.to(device)
    if "sample" not in teacher.modes:
        raise UserError(f"The teacher '{teacher.name}' makes no images.", "")
    if not isinstance(teacher, DiffusionTeacher):
        return teacher.sample(_SAMPLES, generator=generator)[0]
    teacher.sampling_steps = 1
    begin = time.perf_counter()
    teacher.generate(1, generator=generator)
    seconds = (time.perf_counter() - begin) * _SAMPLES * _SAMPLING_STEPS
    if seconds > _PATIENCE:
        raise UserError(f"New samples would take about {seconds / 60:.0f} minutes on this machine.", "")
    teacher.sampling_steps = _SAMPLING_STEPS
    return teacher.generate(_SAMPLES, generator=generator)


def as_dict(value: Any) -> dict[str, Any]:
    """The value if it is a dict, else an empty one: settings files may hold anything."""
    return value if isinstance(value, dict) else {}


def stride_name(level: str) -> str:
    """A level's name in words: "s8" -> "stride 8"."""
    return f"stride {level[1:]}"
