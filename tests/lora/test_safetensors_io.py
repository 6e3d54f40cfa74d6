"""safetensors files are reproducible, written atomically and read back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from echodistill_cli.errors import EchoDistillError
from echodistill_cli.lora.header import header
from echodistill_cli.lora.safetensors_io import serialize, write_safetensors
from echodistill_cli.lora.tensors import kohya_tensors
from tests.helpers.lora_files import SMALL, header_fields


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_equal_content_gives_equal_bytes_in_whatever_order_it_comes() -> None:
    tensors = kohya_tensors([SMALL], "sd", torch.float16)
    metadata = header(header_fields("sd2"), tensors)
    backwards = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    assert len({serialize(tensors, metadata), serialize(tensors, metadata), serialize(*backwards)}) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_written_file_holds_the_same_bits_and_can_be_read_by_everybody(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = kohya_tensors([SMALL], "sd", dtype)
    write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in tensors.items())
    alphas = [tensor for key, tensor in found.items() if key.endswith(".alpha")]
    assert all(alpha.ndim == 0 and alpha.dtype == torch.float32 and alpha == 2.0 for alpha in alphas)
    assert names_in(tmp_path) == ["a.safetensors"]


def test_views_that_share_memory_are_written_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    write_safetensors(tmp_path / "a.safetensors", {"whole": base, "turned": base.T}, {})
    torch.testing.assert_close(load_file(tmp_path / "a.safetensors")["turned"], base.T)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_refused_by_name_and_the_old_file_stays(bad: float, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": torch.ones(2)}, {})
    before = path.read_bytes()
    with pytest.raises(EchoDistillError, match=r"broken\.weight holds NaN or infinity"):
        write_safetensors(path, {"fine": torch.ones(2), "broken.weight": torch.tensor([1.0, bad])}, {})
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["a.safetensors"]


def test_a_write_that_fails_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits on file sizes are a POSIX thing")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(EchoDistillError, match="could not be written") as caught:
            write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == 1
    assert names_in(tmp_path) == []


def test_a_rename_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(EchoDistillError, match="could not be written"):
        write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    assert names_in(tmp_path) == ["a.safetensors"]


def test_a_missing_folder_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(EchoDistillError, match=r"could not be written .* Its folder does not exist"):
        write_safetensors(tmp_path / "nowhere" / "a.safetensors", {"x": torch.ones(2)}, {})


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named_with_its_remedy(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(EchoDistillError, match="You may not write there"):
            write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    finally:
        tmp_path.chmod(0o700)
