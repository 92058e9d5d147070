import pytest
import torch

import hope

torch.set_num_threads(1)  # tensors here are small, and pytest runs several processes


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


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
