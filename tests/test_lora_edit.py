"""Adapters made of models and of other adapters: extraction, resizing, mixing."""

import lora_files as made
import pytest
import torch
from lora_cli import character, style, succeed
from safetensors import safe_open
from safetensors.torch import load_file

from fewstep.export.lora_svd import choose_rank, truncate, truncate_low_rank
from fewstep.models.lora.weights import LowRank
from fewstep.models.pipeline import load

__all__ = ["character", "style"]  # fixtures


def test_rank_by_energy():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])
    ranks = [choose_rank(values, 14.0, energy, 9) for energy in (0.0, 9 / 14, 0.65, 13 / 14, 0.93, 1.0)]
    assert ranks == [1, 1, 2, 2, 3, 3]
    assert choose_rank(values, 14.0, 1.0, 2) == 2
    assert choose_rank(torch.zeros(3), 0.0, 0.9, 3) == 1


def test_truncation_is_the_best_of_its_rank():
    torch.manual_seed(0)
    matrix = torch.randn(30, 20)
    values = torch.linalg.svdvals(matrix)
    low_rank, kept = truncate(matrix, 1.0, 5)
    assert (matrix - low_rank.delta()).norm().item() == pytest.approx(values[5:].norm().item(), rel=1e-4)
    assert kept.energy / kept.total == pytest.approx((values[:5].norm() / values.norm()).item() ** 2, rel=1e-4)
    whole = LowRank(torch.randn(6, 20), torch.randn(30, 6), 0.7)
    for found in (truncate_low_rank(whole, 1.0, 4)[0], truncate(whole.delta(), 1.0, 4)[0]):
        error = (whole.delta() - found.delta()).norm()
        assert error.item() == pytest.approx(torch.linalg.svdvals(whole.delta())[4:].norm().item(), rel=1e-3)


def test_truncation_of_large_matrices_is_close_to_the_best(monkeypatch):
    """Of matrices with more than 1,024 rows and columns only the leading part is computed."""
    monkeypatch.setattr("fewstep.export.lora_svd._WHOLE", 100)
    torch.manual_seed(0)
    values = 0.9 ** torch.arange(200).float()
    left, right = (torch.linalg.qr(torch.randn(200, 200))[0] for _ in range(2))
    matrix = left * values @ right
    low_rank, kept = truncate(matrix, 0.99, 64)
    needed = int((values.square().cumsum(0) >= 0.99 * values.square().sum()).int().argmax()) + 1
    assert kept.rank == needed
    assert (matrix - low_rank.delta()).norm().item() == pytest.approx(values[needed:].norm().item(), rel=1e-2)


def test_extraction_gives_the_tuned_model_back(tiny, tiny_folder, character, tmp_path):
    succeed("lora", "merge", tiny_folder, character, "--out", tmp_path / "tuned")
    out = tmp_path / "extracted.safetensors"
    more = ("--energy", 1, "--rank", 48, "--dtype", "fp32")
    done = succeed("lora", "extract", tiny_folder, tmp_path / "tuned", "--out", out, *more)
    assert "7 linear layers" in done.stdout
    again = load(tiny_folder, "cpu", loras={str(out): 1.0}).transformer.state_dict()
    tuned = load(tmp_path / "tuned", "cpu").transformer.state_dict()
    torch.testing.assert_close(again, tuned, atol=1e-5, rtol=1e-4)
    small = tmp_path / "small.safetensors"
    done = succeed("lora", "extract", tiny_folder, tmp_path / "tuned", "--out", small, "--energy", 0.5, "--rank", 2)
    assert {len(tensor) for key, tensor in load_file(small).items() if "lora_A" in key} <= {1, 2}
    assert "ranks 1 to 2" in done.stdout


def test_what_no_lora_can_hold_is_named(tiny_folder, tiny, tmp_path):
    changed = made.merged_by_hand(tiny, (made.deltas(made.adapter_for(tiny.transformer)), 1.0))
    with torch.no_grad():
        changed.x_pad_token += 1
    tiny.with_transformer(changed, tiny.generation_config).save(tmp_path / "tuned")
    done = succeed("lora", "extract", tiny_folder, tmp_path / "tuned", "--out", tmp_path / "a.safetensors")
    assert "not in the LoRA, which has linear layers alone: one other tensor: x_pad_token" in done.stderr


def test_resize(tiny, character, tmp_path):
    out = tmp_path / "small.safetensors"
    done = succeed("lora", "resize", character, "--out", out, "--rank", 2)
    whole = made.deltas(made.adapter_for(tiny.transformer, seed=1))
    small = load_file(out)
    left = total = 0.0
    for layer, delta in whole.items():
        found = small[f"transformer.{layer}.lora_B.weight"] @ small[f"transformer.{layer}.lora_A.weight"]
        best = torch.linalg.svdvals(delta)[2:].norm().item()
        assert (delta - found).norm().item() == pytest.approx(best, rel=1e-2)
        left, total = left + best**2, total + delta.norm().item() ** 2
    assert f"{100 * (1 - left / total):.2f}% of the squared norm" in done.stdout


def test_a_lokr_becomes_a_lora(tiny, tmp_path):
    parts, expected = made.lokr(tiny.transformer)
    file = made.keyed("lycoris_", "layers.1.feed_forward.w2", parts)
    path, out = made.save(tmp_path / "a.safetensors", file), tmp_path / "b.safetensors"
    succeed("lora", "resize", path, "--out", out, "--rank", 48)
    found = load_file(out)
    name = "transformer.layers.1.feed_forward.w2"
    torch.testing.assert_close(found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"], expected)


def test_mixtures(tiny, tiny_folder, character, style, tmp_path):
    """Concatenation is both adapters, exactly; the sum is the best of its rank."""
    out = tmp_path / "both.safetensors"
    succeed("lora", "mix", f"{character}:0.8", f"{style}:0.6", "--out", out, "--dtype", "fp32")
    whole = made.deltas(made.adapter_for(tiny.transformer, seed=1))
    _, second = made.fused(made.adapter_for(tiny.transformer, made.LAYERS[:5], rank=2, seed=2))
    both = load(tiny_folder, "cpu", loras={str(out): 1.0}).transformer.state_dict()
    expected = made.merged_by_hand(tiny, (whole, 0.8), (second, 0.6)).state_dict()
    torch.testing.assert_close(both, expected, atol=1e-5, rtol=1e-4)
    with safe_open(out, "pt") as tensors:
        assert tensors.metadata()["modelspec.merged_from"] == "character:0.8, style:0.6"
    small = tmp_path / "small.safetensors"
    succeed("lora", "mix", f"{character}:0.8", f"{style}:0.6", "--out", small, "--dtype", "fp32", "--rank", 3)
    layer, found = "layers.0.attention.to_q", load_file(small)
    total = 0.8 * whole[layer] + 0.6 * second[layer]
    delta = found[f"transformer.{layer}.lora_B.weight"] @ found[f"transformer.{layer}.lora_A.weight"]
    assert (total - delta).norm().item() == pytest.approx(torch.linalg.svdvals(total)[3:].norm().item(), rel=1e-3)
