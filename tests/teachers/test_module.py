"""A user's own module as the teacher: what its maps equal, what is refused and how, files, the example."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamteacher.teachers.module import ModuleTeacher, teacher_from_file
from dreamteacher.teachers.registry import load_teacher
from dreamteacher.testing import check_teacher
from tests.builders.pictures import refused
from tests.places import ROOT

WEIGHTS = ROOT.parent / "shared" / "data" / "weights" / "dcgan_celeba32_generator.pt"
needs_weights = pytest.mark.skipif(
    not WEIGHTS.is_file(), reason=f"the published weights are not in ../shared/data/weights/{WEIGHTS.name}"
)


class Autoencoder(nn.Module):
    """Strides 32 to 1 by convolutions, and back; in-place activations, a residual sum, a part never read."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, 6, 8, stride=8), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 4, stride=4)
        )
        self.coarse = nn.Sequential(
            nn.Conv2d(5, 7, 3, padding=1), nn.BatchNorm2d(7), nn.LeakyReLU(0.2, inplace=True)
        )
        self.mid = nn.Module()
        self.mid.conv = nn.Conv2d(7, 7, 3, padding=1)
        self.up = nn.ConvTranspose2d(7, 4, 8, stride=8)
        self.image = nn.Conv2d(4, 3 * 16, 1)

    def decoder(self, z: Tensor) -> Tensor:
        x = self.coarse(z)
        x = F.relu(x + self.mid.conv(x), inplace=True)
        return torch.sigmoid(F.pixel_shuffle(self.image(self.up(x)), 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.down(x))


class Decoder(Autoencoder):
    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(z)


LEVELS = {32: "coarse", 4: "up"}


def network(cls: type[nn.Module] = Autoencoder) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = cls()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return net.eval()


def draw(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 5, 2, 3, generator=generator)


def prepare(images: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(images.shape, generator=generator)
    return images * 2 - 1 + 0.1 * noise


def encoder(**options) -> ModuleTeacher:
    given = {"name": "own", "size": (64, 96), "levels": LEVELS, "encode": prepare} | options
    return ModuleTeacher(given.pop("module", None) or network(), **given)


def decoder(**options) -> ModuleTeacher:
    given = {"name": "own", "size": (64, 96), "levels": LEVELS, "sample": draw} | options
    return ModuleTeacher(given.pop("module", None) or network(Decoder), **given)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hooks(net: nn.Module, x: Tensor, places: list[str]) -> tuple[Tensor, list[Tensor]]:
    """Oracle: copies of what the named submodules return during the module's own forward pass."""
    caught: dict[str, Tensor] = {}
    hooks = [
        net.get_submodule(p).register_forward_hook(lambda _m, _a, out, p=p: caught.update({p: out.clone()}))
        for p in places
    ]
    with torch.no_grad():
        out = net(x)
    for hook in hooks:
        hook.remove()
    return out, [caught[p] for p in places]


@pytest.mark.parametrize("places", [{4: "up", 32: "coarse"}, {4: "up", 32: "coarse.1"}, {32: "mid.conv"}])
def test_maps_are_those_of_the_module_s_own_forward(places):
    # coarse.1 is overwritten in place by the activation behind it: the map is what BatchNorm gave.
    net, order = network(), [places[s] for s in sorted(places)]
    images = torch.rand(2, 3, 64, 96, generator=seeded(1))
    _, expected = by_hooks(net, prepare(images, seeded(2)), order)
    maps = encoder(levels=places).encode(images, generator=seeded(2))
    assert all((a - b).abs().max().item() == 0.0 for a, b in zip(maps, expected, strict=True))
    out, expected = by_hooks(network(Decoder), draw(2, seeded(3)), order)
    made, maps = decoder(levels=places).sample(2, generator=seeded(3))
    assert torch.equal(made, out)
    assert all((a - b).abs().max().item() == 0.0 for a, b in zip(maps, expected, strict=True))


def test_an_operation_can_be_a_place():
    teacher = encoder(levels={32: "relu"})
    images = torch.rand(1, 3, 64, 96, generator=seeded(1))
    net = network()
    with torch.no_grad():
        x = net.coarse(net.down(prepare(images, seeded(2))))
        expected = F.relu(x + net.mid.conv(x))
    assert torch.equal(teacher.encode(images, generator=seeded(2))[0], expected)


def test_contracts_and_channels():
    for teacher in (
        encoder(),
        decoder(),
        decoder(
            module=network(Autoencoder),
            sample=lambda n, g: prepare(torch.zeros(n, 3, 64, 96), g),
            encode=prepare,
        ),
    ):
        check_teacher(teacher)
        assert [(s.name, s.channels, s.stride) for s in teacher.specs] == [("s4", 4, 4), ("s32", 7, 32)]
        assert teacher.multiple == 32
    assert teacher.modes == {"encode", "sample"}
    teacher.keep_only("encode")
    check_teacher(teacher)
    refused(lambda: encoder().sample(1, generator=seeded()), "cannot sample")
    refused(lambda: decoder().encode(torch.rand(1, 3, 64, 96), generator=seeded()), "cannot encode")
    assert encoder().licence == "not recorded"


def test_encode_stops_at_the_last_level_and_compiles():
    teacher = encoder(levels={32: "coarse"})
    assert {k.split(".")[2] for k in teacher.state_dict()} == {"down", "coarse"}  # the rest is gone
    x = prepare(torch.rand(1, 3, 64, 96, generator=seeded()), seeded())
    walk = torch.compile(teacher.pruned, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(walk(x)["32"], teacher.pruned(x)["32"])


def test_a_function_reads_what_cannot_be_traced():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(Decoder)

        def forward(self, z: Tensor) -> Tensor:
            return self.net(z if z.sum() > 1e9 else -z)

    refused(
        lambda: decoder(module=Branches(), levels={32: "net.coarse"}), "cannot be traced", "as a function"
    )

    def read(module: nn.Module, z: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        coarse = module.net.coarse(-z)
        fine = module.net.up(F.relu(coarse + module.net.mid.conv(coarse)))
        return module(z), {4: fine, 32: coarse}

    teacher = decoder(module=Branches(), levels=read)
    check_teacher(teacher)
    out, expected = by_hooks(teacher.whole.net, -draw(2, seeded(4)), ["up", "coarse"])
    made, maps = teacher.sample(2, generator=seeded(4))
    assert torch.equal(made, out)
    assert all(map(torch.equal, maps, expected))


class Noisy(Decoder):
    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(z + torch.randn(5, 1, 1))


class Counting(Decoder):
    """Depends on a number that a trace would take for a constant."""

    calls = 0

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self.decoder(z * self.calls)


WRONG = [
    (lambda: decoder(sample=None), ["can do nothing"]),
    (lambda: decoder(levels={32: "coarze"}), ["'coarze'", "Did you mean 'coarse'?", "Its places: coarse, "]),
    (lambda: encoder(levels={32: "down.7"}), ["'down.7'", "Did you mean"]),
    (lambda: decoder(levels={8: "up"}), ["'up' of 'own' has stride 4, not 8", "16 x 24", "64 x 96"]),
    (lambda: decoder(levels={32: "coarse", 16: "mid"}), ["'mid' of 'own' has stride 32, not 16"]),
    (lambda: encoder(size=(64, 64), levels=lambda m, x: (None, {4: x[:, :, ::4, ::6]})), ["stride 4 x 5.81818"]),
    (lambda: decoder(levels={7: "up"}), ["not 7", "4, 8, 16, 32"]),
    (lambda: decoder(levels={}), ["has none"]),
    (lambda: encoder(levels=lambda m, x: (None, {4: x.flatten()})), ["must be a map of 1 x C x H x W", "(18432,)"]),
    (lambda: encoder(levels=lambda m, x: (None, {4: None})), ["not NoneType"]),
    (lambda: encoder(levels=lambda m, x: (None, {5: x})), ["not 5"]),
    (lambda: decoder(size=(128, 96)), ["stride 64 x 32, not 32"]),
    (lambda: decoder(to_images=lambda x: x[:, :2]), ["(1, 3, 64, 96), not (1, 2, 64, 96)", "to_images"]),
    (lambda: decoder(to_images=lambda x: x * 9 - 4), ["must lie in [0, 1]", "go from -"]),
    (lambda: decoder(to_images=lambda x: (x, x)), ["not tuple"]),
    (lambda: decoder(module=network(Noisy)), ["global random generator"]),
    (lambda: decoder(sample=lambda n, g: torch.randn(n, 5, 2, 3)), ["global random generator"]),
    (lambda: encoder(sample=lambda n, g: torch.ones(n, 3, 64, 96), levels=lambda m, x: (x.clamp(0, 1), {8: x[:, : 2 if x.std() else 1, ::8, ::8]})), ["8: 2 to encode, but 8: 1 to sample"]),
    (lambda: decoder(module=network(Counting)), ["something else once it is traced", "as a function"]),
    (lambda: encoder().encode(torch.zeros(1, 3, 60, 96), generator=seeded()), ["multiples of 32"]),
]  # fmt: skip


@pytest.mark.parametrize(("act", "words"), WRONG, ids=[w[0] for _, w in WRONG])
def test_bad_requests_say_what_came(act, words):
    state = torch.get_rng_state()
    text = refused(act, *words)
    assert torch.equal(state, torch.get_rng_state())
    assert len(text) < 450


# --- from a file --------------------------------------------------------------------------------------------

OWN = '''\
"""A teacher in a file of its own, with a dataclass and a neighbour."""
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn
from dreamteacher.runtime.errors import UserError
from dreamteacher.teachers.module import ModuleTeacher
from my_neighbour import CHANNELS

@dataclass
class Size:
    side: int = 32

def teacher():
    net = nn.Sequential(nn.Conv2d(3, CHANNELS, 4, stride=4), nn.ReLU())
    return ModuleTeacher(net, name="own", size=(Size().side,) * 2, levels={4: "1"}, encode=lambda x, g: x)

def number():
    return 3

def fails():
    raise ValueError("no such thing\\nand more")

def deep():
    return torch.zeros(2) @ torch.zeros(3)

def asks():
    raise UserError("The weights are missing.", "Fetch them.")
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own_teacher.py").write_text(OWN)
    (tmp_path / "my_neighbour.py").write_text("CHANNELS = 6\n")
    (tmp_path / "broken.py").write_text("import torch\n\nx = = 3\n")
    (tmp_path / "stops.py").write_text("import torch\n\nraise KeyError('gone')\n")
    yield tmp_path
    sys.modules.pop("my_neighbour", None)


def test_a_function_of_a_file(own):
    path, state = list(sys.path), torch.get_rng_state()
    teacher = load_teacher(f"{own / 'own_teacher.py'}:teacher")
    check_teacher(teacher)
    assert teacher.specs[0].channels == 6
    assert sys.path == path
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.py:teacher", ["There is no file", "FILE.py:FUNCTION"]),
        ("own_teacher.py:taecher", ["no function 'taecher'", "Did you mean 'teacher'?"]),
        ("own_teacher.py:", ["no function ''", "It has: teacher, number, fails, deep, asks."]),
        ("own_teacher.py:number", ["must return a Teacher, not int"]),
        ("own_teacher.py:fails", ["stopped in line 22 with ValueError: no such thing."]),
        ("own_teacher.py:deep", ["in line 25 with RuntimeError"]),
        ("own_teacher.py:asks", ["The weights are missing.\nFetch them."]),
        ("broken.py:teacher", ["in line 3 with SyntaxError"]),
        ("stops.py:teacher", ["in line 3 with KeyError: 'gone'"]),
    ],
)
def test_files_that_give_no_teacher(own, name, words):
    path, modules = list(sys.path), set(sys.modules)
    refused(lambda: teacher_from_file(str(own / name)), *words)
    assert sys.path == path
    if name.startswith(("broken", "stops")):
        assert set(sys.modules) == modules


# --- the example --------------------------------------------------------------------------------------------


@needs_weights
def test_dcgan(monkeypatch):
    monkeypatch.setenv("DREAMTEACHER_DCGAN", str(WEIGHTS))
    teacher = teacher_from_file(f"{ROOT / 'examples' / 'dcgan.py'}:teacher")
    assert isinstance(teacher, ModuleTeacher)
    check_teacher(teacher)
    assert [(s.stride, s.channels) for s in teacher.specs] == [(4, 64), (8, 128)]
    images, maps = teacher.sample(2, generator=seeded(5))
    w = torch.load(WEIGHTS, map_location="cpu", weights_only=True)

    def norm(x: Tensor, layer: int) -> Tensor:
        part = {
            k: w[f"generator_deconv.{layer}.1.{k}"].view(1, -1, 1, 1)
            for k in ("weight", "bias", "running_mean", "running_var")
        }
        return (x - part["running_mean"]) / (part["running_var"] + 1e-5).sqrt() * part["weight"] + part[
            "bias"
        ]

    x = torch.rand(2, 100, generator=seeded(5))[:, :, None, None] * 2 - 1
    x = norm(F.conv_transpose2d(x, w["generator_deconv.0.0.weight"]), 0)
    first = F.leaky_relu(norm(F.conv2d(x, w["generator_deconv.1.0.weight"], padding=1), 1), 0.2)
    second = F.leaky_relu(
        norm(F.conv_transpose2d(first, w["generator_deconv.2.0.weight"], stride=2, padding=1), 2), 0.2
    )
    torch.testing.assert_close(maps[1], first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps[0], second, rtol=1e-4, atol=1e-4)
    x = F.leaky_relu(
        norm(F.conv_transpose2d(second, w["generator_deconv.3.0.weight"], stride=2, padding=1), 3), 0.2
    )
    x = F.conv_transpose2d(
        x, w["generator_deconv.4.0.weight"], w["generator_deconv.4.0.bias"], stride=2, padding=1
    )
    torch.testing.assert_close(images, (x.tanh() + 1) / 2, rtol=1e-4, atol=1e-4)


def test_the_example_says_where_its_weights_are_wanted(monkeypatch, tmp_path):
    monkeypatch.setenv("DREAMTEACHER_DCGAN", str(tmp_path / "gone"))
    refused(
        lambda: teacher_from_file(f"{ROOT / 'examples' / 'dcgan.py'}:teacher"),
        "weights are not at",
        "gone",
        "DREAMTEACHER_DCGAN",
    )
