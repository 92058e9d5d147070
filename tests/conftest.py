import pytest
import torch

import hope

torch.set_num_threads(1)  # tensors here are small, and pytest runs several processes


def pytest_addoption(parser, pluginmanager):
    """Where there is no pytest-xdist or nbval, as on a machine that was rented for its GPU, the options that pyproject.toml
    gives them mean nothing."""
    for plugin, names in (("xdist", ("-n", "--dist")), ("nbval", ("--nbval-cell-timeout",))):
        for name in names if not pluginmanager.hasplugin(plugin) else ():
            parser.getgroup("absent")._addoption(name)


def random_model(config: hope.HopeConfig, seed: int = 0) -> hope.Hope:
    """A model in float64 whose every parameter is away from its start value, so that no path is switched off."""
    torch.manual_seed(seed)
    model = hope.Hope(config).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p) / max(1, p.shape[-1] if p.ndim > 1 else 1) ** 0.5
    return model


def small_config(arch: str = "hope", **overrides) -> hope.HopeConfig:
    settings = dict(
        vocab_size=11, n_layer=2, d_model=8, n_head=2, cms_hidden=1.0, chunk=4, chunk_proj=4, cms=(6, 12, hope.INF)
    )
    return hope.HopeConfig.preset("tiny", arch, **{**settings, **overrides})


def tokens(b: int, t: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 11, (b, t), generator=torch.Generator().manual_seed(seed))


def cut(x: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    """x: (b, t) -> its pieces between the cuts."""
    edges = [0, *sorted(cuts), x.shape[1]]
    return [x[:, a:b] for a, b in zip(edges, edges[1:])]


def flat(state) -> list[torch.Tensor]:
    """Every tensor of a state."""
    found = []
    hope.map_state(lambda z: found.append(z) or z, state)
    return found


def assert_states_equal(a, b) -> None:
    for x, y in zip(flat(a), flat(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


def assert_any_split_agrees(call, cuts: list[int], *streams: torch.Tensor) -> None:
    """call(*streams, state) -> (output, state) gives on the pieces of its streams (b, t) what it gives on the whole."""
    whole, end = call(*streams, None)
    state, parts = None, []
    for pieces in zip(*(cut(x, cuts) for x in streams)):
        out, state = call(*pieces, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-7, atol=1e-9)
    assert_states_equal(state, end)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
