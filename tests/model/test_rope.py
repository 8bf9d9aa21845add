from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from conf.errors import UserError
from conf.schema import RopeConfig
from model.rope import Rotary, apply_rope, ntk_theta, rope_parameters, yarn_attention_factor
from model.rope_hf import from_hf, to_hf

KINDS = {
    "default": RopeConfig(theta=500_000.0),
    "linear": RopeConfig(kind="linear", factor=4.0),
    "ntk": RopeConfig(kind="ntk", factor=8.0),
    "llama3": RopeConfig(kind="llama3", theta=500_000.0, factor=8.0, original_seq_len=8192),
    "llama3_32": RopeConfig(
        kind="llama3",
        theta=500_000.0,
        factor=32.0,
        original_seq_len=8192,
        low_freq_factor=2.0,
        high_freq_factor=8.0,
    ),
    "yarn": RopeConfig(kind="yarn", theta=1_000_000.0, factor=4.0, original_seq_len=32_768),
    "yarn_set": RopeConfig(
        kind="yarn", factor=16.0, original_seq_len=4096, beta_fast=16.0, beta_slow=2.0, attention_factor=1.1
    ),
}


def hf_rotary(rope: RopeConfig, head_dim: int, max_position: int) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=max_position,
        rope_parameters=to_hf(rope, head_dim)["rope_parameters"],
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", KINDS)
def test_frequencies_are_those_of_transformers(name: str, head_dim: int) -> None:
    theirs = hf_rotary(KINDS[name], head_dim, 131_072)
    inv_freq, scale = rope_parameters(KINDS[name], head_dim)
    assert inv_freq.dtype == torch.float32
    assert torch.equal(inv_freq, theirs.inv_freq)
    assert scale == pytest.approx(theirs.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("seq_len", [8_192, 32_768, 131_072, 262_144, 524_288, 1_048_576])
@pytest.mark.parametrize("name", KINDS)
def test_tables_agree_with_transformers_in_float64(name: str, seq_len: int) -> None:
    """Their tables, with their own frequencies and the product in float64, to 1e-6 at 8K to 1M positions."""
    theirs = hf_rotary(KINDS[name], 128, seq_len)
    positions = torch.cat([torch.arange(64), torch.arange(seq_len - 64, seq_len)])
    angle = positions.double()[:, None] * theirs.inv_freq.double()
    cos, sin = Rotary(KINDS[name], 128).tables(positions)
    assert (cos - angle.cos() * theirs.attention_scaling).abs().max() < 1e-6
    assert (sin - angle.sin() * theirs.attention_scaling).abs().max() < 1e-6


def test_error_at_a_million() -> None:
    """Ours is one fp32 rounding (6e-8). Theirs, an fp32 product, is off by more than 1e-2 there."""
    positions = torch.arange(1_048_576 - 4096, 1_048_576)
    inv_freq, _ = rope_parameters(RopeConfig(), 128)
    exact = (positions.double()[:, None] * inv_freq.double()).cos()
    ours, _ = Rotary(RopeConfig(), 128).tables(positions)
    theirs, _ = hf_rotary(RopeConfig(), 128, 1_048_576)(torch.zeros(1), positions[None])
    assert (ours - exact).abs().max() < 1e-7
    assert (theirs[0, :, :64] - exact).abs().max() > 1e-2


@pytest.mark.parametrize("name", KINDS)
def test_error_at_the_last_position_of_a_million(name: str) -> None:
    """cos and sin at position 1,048,575 against frequency x position in decimal arithmetic of 60 digits."""
    position = 1_048_575
    inv_freq, scale = rope_parameters(KINDS[name], 128)
    exact = torch.tensor([_decimal_angle(float(f), position) for f in inv_freq], dtype=torch.float64)
    cos, sin = Rotary(KINDS[name], 128).tables(torch.tensor([position]))
    theirs = hf_rotary(KINDS[name], 128, position + 1)(torch.zeros(1), torch.tensor([[position]]))
    ours = max(_error(cos[0], exact.cos() * scale), _error(sin[0], exact.sin() * scale))
    upstream = max(
        _error(theirs[0][0, 0, :64], exact.cos() * scale), _error(theirs[1][0, 0, :64], exact.sin() * scale)
    )
    print(
        f"{name}: error at position {position:,}: {ours:.1e}, with the fp32 angles of transformers {upstream:.1e}"
    )
    assert ours < 1.3e-7 * scale
    assert upstream > 100 * ours


def _error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).abs().max())


def _decimal_angle(frequency: float, position: int) -> float:
    """frequency * position modulo 2 pi, exact to float64."""
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 60
        two_pi = Decimal("6.28318530717958647692528676655900576839433879875021164194988918461563281257")
        return float(Decimal(frequency) * position % two_pi)


def test_tables_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.randint(0, 1_048_576, (100,))
    whole = Rotary(KINDS["yarn"], 16).tables(positions)
    monkeypatch.setattr("model.rope._CHUNK", 7)
    for ours, theirs in zip(Rotary(KINDS["yarn"], 16).tables(positions), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_rotation_and_its_gradient() -> None:
    torch.manual_seed(0)
    q = torch.randn(10, 3, 16, dtype=torch.float64, requires_grad=True)
    cos, sin = (table.double() for table in Rotary(KINDS["yarn_set"], 16).tables(torch.arange(10) * 1000))
    full = [torch.cat([table, table], -1)[None] for table in (cos, sin)]
    theirs, _ = apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], *full)
    assert torch.allclose(apply_rope(q, cos, sin), theirs[0].transpose(0, 1), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin), q)


def test_rotation_of_bf16_rounds_once() -> None:
    q = torch.randn(32, 2, 16).bfloat16()
    cos, sin = Rotary(RopeConfig(), 16).tables(torch.arange(32))
    assert torch.equal(apply_rope(q, cos, sin), apply_rope(q.float(), cos, sin).bfloat16())


def test_ntk_keeps_the_shortest_wavelength_and_stretches_the_longest() -> None:
    plain, _ = rope_parameters(RopeConfig(), 64)
    scaled, _ = rope_parameters(RopeConfig(kind="ntk", factor=8.0), 64)
    assert scaled[0] == plain[0]
    assert float(plain[-1] / scaled[-1]) == pytest.approx(8.0, rel=1e-5)
    assert ntk_theta(10_000.0, 1.0, 64) == 10_000.0


@pytest.mark.parametrize("name", [name for name in KINDS if name != "ntk"])
@pytest.mark.parametrize("form", ["new", "old"])
def test_hf_round_trip(name: str, form: str) -> None:
    both = to_hf(KINDS[name], 64)
    keys = ["rope_parameters"] if form == "new" else ["rope_theta", "rope_scaling"]
    assert from_hf({key: both[key] for key in keys}) == KINDS[name]


def test_hf_both_forms_mean_one_thing_to_transformers() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, **to_hf(KINDS["yarn"], 16))
    assert config.rope_parameters == to_hf(KINDS["yarn"], 16)["rope_parameters"]


def test_ntk_leaves_as_its_theta() -> None:
    back = from_hf(to_hf(KINDS["ntk"], 64))
    assert back == RopeConfig(theta=ntk_theta(10_000.0, 8.0, 64))
    assert torch.equal(rope_parameters(back, 64)[0], rope_parameters(KINDS["ntk"], 64)[0])


def test_older_folders() -> None:
    """`type` for `rope_type`; lengths and factors that transformers derives from other keys."""
    llama2 = from_hf({"rope_scaling": {"type": "linear", "factor": 2.0}, "max_position_embeddings": 4096})
    assert llama2 == RopeConfig(kind="linear", factor=2.0)
    assert from_hf({"rope_theta": 1e6, "rope_scaling": None}) == RopeConfig(theta=1e6)
    yarn = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024}
    assert from_hf({"rope_scaling": yarn, "max_position_embeddings": 8192}).factor == 8.0
    scaled = from_hf({"rope_parameters": {**yarn, "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5}})
    theirs = {**yarn, "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5, "rope_theta": 10_000.0}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=theirs)
    assert yarn_attention_factor(scaled) == pytest.approx(LlamaRotaryEmbedding(config).attention_scaling)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_seq_len"),
    ],
)
def test_refused_hf_settings(config: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        from_hf(config)


@pytest.mark.parametrize(
    ("rope", "word"),
    [
        (RopeConfig(kind="longrope"), "rope.kind"),
        (RopeConfig(factor=2.0), "rope.factor"),
        (RopeConfig(kind="linear", factor=0.5), "rope.factor"),
        (RopeConfig(theta=0.0), "rope.theta"),
        (RopeConfig(kind="yarn", factor=2.0), "rope.original_seq_len"),
        (RopeConfig(kind="llama3", factor=2.0, original_seq_len=8, low_freq_factor=4.0), "rope.low_freq_factor"),
    ],
)
def test_refused_settings(rope: RopeConfig, word: str) -> None:
    with pytest.raises(UserError, match=word):
        rope_parameters(rope, 64)
