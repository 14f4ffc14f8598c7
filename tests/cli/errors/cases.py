"""Every error that a user can make: the command that makes it, and words that must be printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.cli.errors.commands import (
    baseline,
    classify,
    detect,
    full,
    get,
    inspect,
    interpret,
    label,
    panoptic,
    pretrain,
    segment,
    streamed,
    train,
)
from tests.cli.errors.faults import (
    a_bad_block,
    a_worker_is_killed,
    another_process_writes,
    full_at_the_second_checkpoint,
    full_while_a_teacher_is_trained,
    little_space,
    nan_in_a_map,
    nan_loss,
    nan_teacher_loss,
    out_of_memory,
    without_a_network,
    without_onnx,
    without_s3,
    without_torchrun,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What happened, in words; the command that makes it happen; words that must be printed.

    `kept` is False for the errors that come in the middle of a run, whose checkpoints stay.
    """

    what: str
    command: list[str]
    says: tuple[str, ...]
    patch: Callable[[pytest.MonkeyPatch], None] | None = None
    kept: bool = True


def case(what: str, command: list[str], *says: str, **more: Any) -> Case:
    return Case(what=what, command=command, says=says, **more)


SECTIONS: dict[str, list[Case]] = {
    "The command line": [
        case("An unknown verb", ["pretrian"], "Did you mean 'pretrain'?"),
        case(
            "An unknown setting", pretrain("--epoch", "3"), "'pretrain' has no setting --epoch. Did you mean"
        ),
        case("An unknown setting of a part", classify("--finetune.step", "3"), "'--finetune.steps'"),
        case("A setting is missing", ["pretrain", "--images", "photos"], "'pretrain' needs --out"),
        case(
            "A word where a number is wanted", pretrain(epochs="many"), "--epochs takes a number, not 'many'"
        ),
        case("A fraction where a whole number is wanted", pretrain(seed="1.5"), "whole number", "'1.5'"),
        case("One number where two are wanted", pretrain(size="64"), "--size takes INT INT, not '64'"),
        case("An unknown value", pretrain(whiten="chv"), "--whiten cannot be 'chv'. Did you mean 'chw'?"),
        case("An unknown preset", train(preset="cpu64"), "Did you mean 'cpu-64'?"),
        case("An unknown task", classify(tasks="knnn"), "Did you mean 'knn'?", "segment-frozen"),
        case("An unknown list", ["list", "student"], "'students'"),
        case("A name that no list has", ["list", "students", "--filter", "qqq"], "contains 'qqq'"),
        case("An unknown student", pretrain(student="resnet81"), "Did you mean 'resnet"),
        case(
            "A student without a pyramid of maps",
            pretrain(student="xcit_nano_12_p8_224"),
            "cannot be a student",
        ),
        case("An unknown teacher", pretrain(teacher="chest-xray-46"), "Did you mean 'chest-xray-64'?"),
        case("An unknown device", pretrain(device="warp"), "'warp'", "doctor"),
        case("A GPU that torch does not see", pretrain(device="cuda:99"), "'cuda:99'", "doctor"),
        case("A number out of its range", pretrain(lr="-1"), "--lr must be above 0"),
        case(
            "A timestep that the teacher does not have", pretrain(t="5000"), "Timestep 5000 is out of range"
        ),
        case("A batch that cannot be split so", pretrain(accumulate="3"), "does not divide"),
        case("A teacher that sees fewer than no images", pretrain(teacher_batch="-1"), "below 0"),
        case(
            "A GPU that has no memory for the images of a step",
            pretrain(),
            "Step 1 runs out of memory",
            "--width",
            patch=out_of_memory,
            kept=False,
        ),
        case(
            "Several processes that torchrun did not start",
            pretrain(),
            "2 processes could not meet",
            patch=without_torchrun,
        ),
        case("Pretraining without images", pretrain(images=""), "--images FOLDER"),
        case("Evaluation without data", classify(train="", test=""), "nothing to evaluate on"),
    ],
    "Images": [
        case("A missing folder", pretrain(images="nowhere"), "'nowhere' does not exist"),
        case("A file instead of a folder", pretrain(images="notes.txt"), "'notes.txt' is a file"),
        case("An empty folder", pretrain(images="empty"), "No images in 'empty'"),
        case(
            "A folder whose files are all damaged", pretrain(images="damaged"), "3 of 3 images in 'damaged'"
        ),
        case("`--strict` and a corrupt file", pretrain("--strict", images="corrupt"), "1 of 17", "bad.png"),
        case("`--strict` and a truncated file", pretrain("--strict", images="truncated"), "(truncated)"),
        case("`--strict` and a file of no bytes", pretrain("--strict", images="zero"), "(empty file)"),
        case("`--strict` and a text named .jpg", pretrain("--strict", images="text"), "(not an image"),
        case("`--strict` and a huge image", pretrain("--strict", images="huge"), "60000 x 60000"),
        case("`--strict`, another verb", train("--strict", images="text"), "bad.jpg (not an image"),
        case("A batch larger than the set", pretrain(batch_size="64"), "A batch of 64", "16 readable images"),
        case("The same, another verb", train(batch_size="64"), "A batch of 64", "16 readable images"),
        case(
            "A size that the teacher cannot take", pretrain(size="60 64"), "multiples of 32", "--size 64 64"
        ),
        case("A size that the preset cannot take", train(size="64 72"), "multiples of 32"),
        case("A size that no student can take", classify(size="64 60"), "multiples of 32"),
    ],
    "Weights": [
        case("No such file", pretrain(init="weights/none.pth"), "weights/none.pth"),
        case(
            "ImageNet's weights without a network",
            pretrain(init="imagenet", student="resnet18"),
            "cannot be fetched",
            patch=without_a_network,
        ),
        case(
            "A safetensors file of something else",
            pretrain(init="weights/foreign.safetensors"),
            "does not fit",
        ),
        case("A truncated file", pretrain(init="weights/cut.safetensors"), "not a readable safetensors file"),
        case(
            "Weights of another architecture",
            pretrain(init="weights/other.safetensors"),
            "missing",
            "unexpected",
        ),
        case(
            "A run of another student",
            pretrain(init="run", student="test_efficientnet"),
            "holds a test_resnet",
        ),
        case(
            "A pickle with code in it", pretrain(init="weights/code.pth"), "more than tensors", "state_dict()"
        ),
        case("A run that has not finished", classify(init="unfinished"), "has not finished"),
        case("A folder without a teacher", pretrain(teacher="empty"), "holds no teacher"),
        case("Damaged weights of a teacher", pretrain(teacher="teacher-damaged"), "sha256 differs"),
        case("A damaged teacher.json", pretrain(teacher="teacher-card"), "teacher.json' cannot be read"),
        case(
            "A teacher.json of another network", pretrain(teacher="teacher-other"), "does not fit the network"
        ),
    ],
    "Teachers": [
        case(
            "A published teacher that is not here yet",
            pretrain(teacher="adm-imagenet-256"),
            "get-teacher adm-imagenet-256",
            "Without a network",
        ),
        case("An unknown published teacher", get("adm-imagnet-256"), "Did you mean 'adm-imagenet-256'?"),
        case(
            "Its file is not there", get("adm-imagenet-256", file="nowhere.pt"), "'nowhere.pt' does not exist"
        ),
        case(
            "Its file is damaged",
            get("adm-imagenet-256", file="weights/cut.safetensors"),
            "cannot be read as plain weights",
        ),
        case("Its file is another one", get("adm-lsun-cat", file="weights/foreign.safetensors"), "foreign"),
        case(
            "Its file is not the one that was meant",
            get("adm-lsun-cat", file="weights/foreign.safetensors", sha256="0" * 64),
            "sha256",
        ),
        case(
            "A StyleGAN2 pickle that would run a command",
            get("mine", kind="stylegan2", file="hostile.pkl"),
            "os.system",
        ),
        case(
            "An unknown flag of a published network",
            get("mine", like="adm-lsun-cat", settings="heads=4", file="weights/foreign.safetensors"),
            "heads",
        ),
        case("An IC-GAN without images of one's own", get("icgan-256"), "--bank-images"),
        case(
            "A GAN asked for the maps of images",
            pretrain(teacher="gan"),
            "cannot make a dataset that is encoded",
            "--dataset synthesized",
        ),
        case(
            "A GAN asked for another size",
            pretrain(teacher="gan", dataset="synthesized", size="32 32"),
            "images of 64 x 64",
        ),
        case(
            "Both kinds with no room for a kind",
            pretrain(dataset="both", synthesized_fraction="0.01"),
            "--synthesized-fraction",
        ),
        case("A file of one's own that is not there", pretrain(teacher="gone.py:teacher"), "gone.py"),
        case(
            "A function that it does not have", pretrain(teacher="own.py:techer"), "Did you mean 'teacher'?"
        ),
        case("A function that gives no teacher", pretrain(teacher="own.py:number"), "own.py"),
        case("A function that fails", pretrain(teacher="own.py:fails"), "own.py", "ZeroDivisionError"),
        case("Inspecting a GAN's maps of images", inspect(teacher="gan"), "its own samples are inspected"),
        case("More labels than a class has, inspecting", inspect(labels="8"), "too few for --labels 8"),
        case(
            "A setting of the other family",
            train("--schedule", "cosine", preset="stylegan2-cpu-64"),
            "a setting of diffusion teachers",
        ),
        case("The same, the other way round", train("--gamma", "1"), "a setting of StyleGAN2 teachers"),
    ],
    "The run folder": [
        case("It is a file", pretrain(out="notes.txt"), "'notes.txt' is a file, not a folder"),
        case("It lies below a file", pretrain(out="notes.txt/run"), "'notes.txt' is a file, not a folder"),
        case("It holds something else", pretrain(out="thesis"), "'thesis' is not empty and is no run folder"),
        case("The same, another verb", train(out="thesis"), "'thesis' is not empty and is no run folder"),
        case("It holds a run of another verb", train(out="run"), "holds a run of 'pretrain'"),
        case("Other settings than it was started with", pretrain(out="run", lr="1e-3"), "lr: 0.004 -> 0.001"),
        case("A foreign checkpoint in it", pretrain(out="run-foreign"), "not one that dreamteacher wrote"),
        case("A checkpoint of another network in it", pretrain(out="run-other"), "does not fit the network"),
        case("A checkpoint of another verb in it", pretrain(out="run-verb"), "checkpoint of 'train-teacher'"),
        case("All its checkpoints are damaged", pretrain(out="run-garbage"), "None of the checkpoints"),
        case(
            "Its one checkpoint was altered", pretrain(out="run-altered"), "has changed since it was written"
        ),
        case("Results into a file", classify(out="notes.txt"), "notes.txt"),
        case("The disk is too small, seen at the start", pretrain(), "1 MB free", patch=little_space),
        case("The same, another verb", train(), "1 MB free", patch=little_space),
        case(
            "The disk becomes full in the middle",
            pretrain(save_every="1"),
            "the disk is full",
            "resumes",
            patch=full_at_the_second_checkpoint,
            kept=False,
        ),
        case(
            "The same, another verb",
            train(save_every="1", steps="3"),
            "the disk is full",
            patch=full_while_a_teacher_is_trained,
            kept=False,
        ),
        case("A disk fails in the middle", pretrain(), "A disk fails", patch=a_bad_block, kept=False),
        case(
            "A process that decodes images is killed",
            pretrain(cache_gb="0", workers="1", epochs="4"),
            "has died",
            "resumes",
            patch=a_worker_is_killed,
            kept=False,
        ),
        case(
            "The teacher gives NaN",
            pretrain(),
            "The teacher's map s8 is not finite at step 2",
            patch=nan_in_a_map,
            kept=False,
        ),
        case(
            "The loss becomes NaN", pretrain(), "The loss is not finite at step 1", patch=nan_loss, kept=False
        ),
        case(
            "The same, another verb",
            train(),
            "The loss is not finite at step 1",
            patch=nan_teacher_loss,
            kept=False,
        ),
        case(
            "Another process is writing to it",
            pretrain(out="run", save_every="1"),
            "Another process is writing",
            patch=another_process_writes,
        ),
        case(
            "Export without its extra",
            ["export", "--run", "run", "--out", "new/export", "--format", "onnx"],
            "dreamteacher[onnx]",
            patch=without_onnx,
        ),
        case("Export of a missing run", ["export", "--run", "nowhere"], "No run folder at 'nowhere'"),
        case("Export of an unfinished run", ["export", "--run", "unfinished"], "has not finished"),
        case(
            "Export into another folder's files", ["export", "--run", "run", "--out", "thesis"], "thesis.txt"
        ),
        case("A report on nothing", ["report", "--run", "empty"], "'empty' holds no run"),
    ],
    "Labels and masks": [
        case("More labels than images", classify(labels="100"), "100 labels per class", "has 8 images"),
        case("A folder without classes", classify(train="masked"), "'masked' is not sorted into classes"),
        case(
            "Other classes to test on", classify(test="animals"), "Classes of 'photos' and 'animals' differ"
        ),
        case("More masks than there are", segment(mask_counts="100"), "100 labelled images", "2 to 4"),
        case("No masks given", segment(masks=""), "Give both --images and --masks"),
        case("A mask without an image", segment(masks="masks-alone"), "lonely.png"),
        case("A mask of another shape", segment(masks="masks-oblong"), "64 x 64 and its mask 32 x 64"),
        case("Masks in colours", segment(masks="masks-rgb"), "no class ids", "RGB"),
        case("Black and white masks as ids", segment(masks="masks-empty"), "at least two classes"),
    ],
    "The label branch": [
        case("A mask of another shape", interpret(masks="masks-oblong"), "64 x 64 and its mask 32 x 64"),
        case("A mask without an image", interpret(masks="masks-alone"), "lonely.png"),
        case("Masks in colours", interpret(masks="masks-rgb"), "no class ids", "RGB"),
        case("Palettes that differ", interpret(masks="masks-palettes"), "palette", "1.png"),
        case("Unknown classes", interpret("--class-count", "2", masks="masks-unknown"), "3.png (7)"),
        case(
            "Unknown classes in .npy files", interpret("--class-count", "2", masks="masks-npy"), "2.npy (9)"
        ),
        case("A .npy file that holds objects", interpret(masks="masks-npy-objects"), "0.npy"),
        case("A JSON file that is none", interpret(masks="labels/broken.json"), "broken.json"),
        case("A JSON file whose images are missing", interpret(masks="labels/missing.json"), "gone.png"),
        case("A JSON file of unknown categories", interpret(masks="labels/category.json"), "categor"),
        case("More labels than there are", interpret("--labels", "100"), "100 labelled images", "1 to 8"),
        case("No labels at all", interpret(masks=""), "not sorted into at least two subfolders"),
        case("A GAN's maps of images that it did not draw", interpret(teacher="gan"), "samples.json"),
        case("A block that the network does not have", interpret("--blocks", "3", "99"), "has 0 to 9"),
        case("Blocks of another family", interpret("--blocks", "1", teacher="gan"), "Leave out --blocks"),
        case("A mode without labels", pretrain(distill="mixed"), "--interpreter FOLDER"),
        case("Labels without a mode", pretrain(interpreter="interpreter"), "--distill mixed"),
        case(
            "An interpreter of another teacher",
            pretrain(distill="mixed", interpreter="interpreter", teacher="teacher-two"),
            "another teacher",
        ),
        case(
            "An interpreter of other timesteps",
            pretrain(distill="mixed", interpreter="interpreter", t="50 150"),
            "--t 100",
        ),
        case(
            "An unfinished interpreter",
            pretrain(distill="mixed", interpreter="empty"),
            "holds no finished interpreter",
        ),
        case(
            "Bad masks in the one command",
            pretrain(distill="mixed", labelled="masked", masks="masks-rgb"),
            "no class ids",
        ),
        case(
            "A neck of a run that has none",
            segment("--neck", init="weights/other.safetensors", student="test_efficientnet"),
            "regressor",
        ),
        case(
            "A label head of a run that has none", segment(tasks="distilled", init="run"), "head.safetensors"
        ),
        case("Nothing that labels", label(interpreter=""), "0 are given"),
        case(
            "Samples of a student",
            label(interpreter="", run="run", images="", samples="4"),
            "draws no samples",
        ),
        case("A teacher alone", label(interpreter="", teacher="gan"), "labels nothing"),
    ],
    "Detection, segmentation and classification at full size": [
        case("No instances given", detect(instances=""), "Give both --images and --instances"),
        case(
            "Instances that are not there", detect(instances="nowhere.json"), "no instances at 'nowhere.json'"
        ),
        case("Instances in colours", detect(instances="masks-rgb"), "instance PNGs", "number of each pixel"),
        case("PNGs that show no object", detect(instances="masks-empty"), "shows an object"),
        case(
            "Test instances of other categories",
            detect(test_images="masked", test_instances="labels/instances-other.json"),
            "instances differ",
        ),
        case("Test images without instances", detect(test_images="masked"), "Give --test-instances too"),
        case("More images than show an object", detect("--detect.image-counts", "100"), "100", "2 to 4"),
        case("Sides in falling order", detect("--detect.short-side", "96", "64"), "96 to 64"),
        case("No masks for `semantic`", streamed("semantic", masks=""), "Give both --images and --masks"),
        case("Masks in colours for it", streamed("semantic", masks="masks-rgb"), "no class ids"),
        case(
            "More masks than there are",
            streamed("semantic", "--semantic.mask-counts", "100"),
            "100 labelled images asked for",
        ),
        case("A share above 1", streamed("semantic", "--semantic.overlap", "1.5"), "overlap is 1.5"),
        case("Crops that no network fits", streamed("semantic", "--semantic.crops.size", "50", "64"), "50"),
        case("A stride that no level has", streamed("readout", "--readout.stride", "7"), "stride is 7"),
        case(
            "No room for checkpoints of a long training", streamed("readout"), "1 MB free", patch=little_space
        ),
        case("Time that runs backwards", streamed("readout", save_minutes="-1"), "save_minutes is -1"),
        case("No segments", panoptic(segments=""), "Give --images, --masks and --segments"),
        case("Segments that are none", panoptic(segments="labels/instances.json"), "panoptic format"),
        case("Segments whose PNGs are missing", panoptic(masks="masks-alone"), "cannot be used"),
        case("Segments without things", panoptic(), "classes of things and of stuff"),
        case("Classes without subfolders", full("linear-sgd", train="masked"), "is not sorted into classes"),
        case("A momentum of 1", full("linear-sgd", "--linear-sgd.momentum", "1"), "momentum is 1"),
        case(
            "A policy that timm does not know",
            full("finetune-full", "--finetune-full.rand-augment", "random"),
            "no augmentation policy 'random'",
        ),
        case(
            "Parts that a batch does not have",
            full("finetune-full", "--finetune-full.batch-size", "10", "--finetune-full.accumulate", "4"),
            "no 4 even parts",
        ),
        case(
            "Fewer images than parts",
            full("finetune-full", "--finetune-full.accumulate", "16"),
            "16 training images make no 16 even parts",
        ),
        case(
            "Stochastic depth that a network has not",
            full("finetune-full", student="ghostnet_050"),
            "no stochastic depth",
        ),
        case("A compared method without a whole batch", baseline(images_seen="4"), "make no batch of 8"),
        case(
            "Its batch is larger than the folder", baseline(batch_size="64", images_seen="64"), "16 readable"
        ),
        case("Its folder holds something else", baseline(out="thesis"), "is no run folder"),
    ],
    "Public data sets": [
        case(
            "A layout that does not exist", segment(images="ade2k:photos", masks=""), "Did you mean 'ade20k'?"
        ),
        case("A layout without a root", segment(images="ade20k:", masks=""), "names a layout and no root"),
        case(
            "A root that is not there", segment(images="cityscapes:nowhere", masks=""), "nowhere", "Expected"
        ),
        case("A root that lacks a part", classify(train="imagenet:photos", test=""), "as it is downloaded"),
        case("Masks beside a layout", segment(images="ade20k:photos"), "comes with its masks"),
        case("A layout without masks", segment(images="ffhq:photos", masks=""), "has no masks of classes"),
        case("One without panoptic segments", panoptic(images="ade20k:photos"), "has no panoptic segments"),
        case("A folder without shards", pretrain(images="shards:photos"), "No .tar files"),
        case("Compressed shards", pretrain(images="shards:shards-packed"), "are compressed"),
        case("A shard that is cut off", pretrain(images="shards:shards-cut"), "no whole tar file"),
        case("A shard that leads out of itself", pretrain(images="shards:shards-hostile"), "leads out of it"),
        case("A shard of links", pretrain(images="shards:shards-links"), "is a link"),
        case("Shards without images", pretrain(images="shards:shards-empty"), "No images"),
        case(
            "Shards of which some are missing",
            pretrain(images="shards:shards-empty/{0..4}.tar"),
            "4 of 5 shards",
        ),
        case("A brace that is not closed", pretrain(images="shards:s3://bucket/{0..9.tar"), "brace"),
        case("A range that runs backwards", pretrain(images="shards:s3://bucket/{9..0}.tar"), "backwards"),
        case(
            "A folder at an address",
            pretrain(images="shards:https://localhost/shards/"),
            "no address of a .tar",
        ),
        case(
            "A shard that is not there",
            pretrain(images="shards:memory://bucket/{0..1}.tar"),
            "There is no 'memory",
        ),
        case(
            "A store whose library is missing",
            pretrain(images="shards:s3://bucket/0.tar"),
            "dreamteacher[remote]",
            patch=without_s3,
        ),
    ],
    "Presets": [
        case("An unknown preset", classify(preset="imagenet-a1"), "Did you mean 'imagenet-a2'?"),
        case(
            "A preset of another task", classify(preset="imagenet-linear", tasks="knn"), "one of linear-sgd"
        ),
    ],
}
CASES = {(section, c.what): c for section, cases in SECTIONS.items() for c in cases}
