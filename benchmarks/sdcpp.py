"""Opens an export with stable-diffusion.cpp, and compares its image with that of diffusers' transformer.

    pip install stable-diffusion-cpp-python==0.4.7                        # compiles it: 10 minutes of one core
    python benchmarks/random_zimage.py runs/zimage-random --shift 3
    fewstep export runs/zimage-random --to sd.cpp --quantize q8_0 --out runs/zimage-sd
    python benchmarks/sdcpp.py draw runs/zimage-sd --out runs/sdcpp.png
    python benchmarks/sdcpp.py compare runs/zimage-random runs/sdcpp.png

``draw`` needs that package alone, and may run in an environment without fewstep. Both start from torch's noise of one
seed, and are given the same tokens: PROMPT is one letter, whose token is known without Qwen3's tokenizer. ``compare``
computes in fp32 from weights in bf16, a matrix at a time: 13 GB of memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from PIL import Image

PROMPT, SEED, SIZE, SIGMAS = "a", 7, 128, (1.0, 0.75, 0.0)
#: <|im_start|> user \n a <|im_end|> \n <|im_start|> assistant \n
TOKENS = [151644, 872, 198, 64, 151645, 198, 151644, 77091, 198]


def draw(export: Path, out: Path) -> None:
    """An image by stable-diffusion.cpp."""
    from stable_diffusion_cpp import StableDiffusion

    def file(pattern: str) -> str:
        (found,) = export.glob(pattern)
        return str(found)

    engine = StableDiffusion(
        diffusion_model_path=file("diffusion_models/*"),
        llm_path=file("text_encoders/*"),
        vae_path=file("vae/*"),
        rng_type="cpu",
        sampler_rng_type="cpu",
        n_threads=1,
    )
    (image,) = engine.generate_image(
        PROMPT, width=SIZE, height=SIZE, cfg_scale=1.0, sample_method="euler", sample_steps=len(SIGMAS) - 1,
        sigmas=",".join(map(str, SIGMAS)), seed=SEED,
    )  # fmt: skip
    image.save(out)
    print(out)


def compare(model: Path, drawn: Path) -> None:
    """Mean absolute difference of the image from that of diffusers' transformer, and for scale
    that of the noise alone."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, ZImageTransformer2DModel
    from torch import Tensor, nn
    from transformers import Qwen3Model

    def in_fp32(module: nn.Module) -> nn.Module:
        """Computes in fp32; large matrices stay in bf16, and are converted when they are used."""
        for each in module.modules():
            if isinstance(each, nn.Linear) and each.weight.numel() > 10**6:
                each.forward = lambda x, m=each: nn.functional.linear(  # type: ignore[method-assign]
                    x.float(), m.weight.float(), None if m.bias is None else m.bias.float()
                )
            elif isinstance(each, nn.Embedding):
                each.forward = lambda x, m=each: nn.functional.embedding(x, m.weight).float()  # type: ignore[method-assign]
            else:
                for parameter in each.parameters(recurse=False):
                    parameter.data = parameter.data.float()
        return module.eval()

    with torch.no_grad():
        encoder = in_fp32(Qwen3Model.from_pretrained(model / "text_encoder", dtype=torch.bfloat16))
        text = encoder(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states[-2][0]
        del encoder
        transformer = in_fp32(
            ZImageTransformer2DModel.from_pretrained(model / "transformer", torch_dtype=torch.bfloat16)
        )
        vae = AutoencoderKL.from_pretrained(model / "vae").float()

        def image(sigmas: Sequence[float]) -> Tensor:
            x = torch.randn(1, 16, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(SEED))
            for sigma, following in pairwise(sigmas):
                time = torch.tensor([1 - sigma])
                velocity = -transformer([x[0, :, None]], time, [text], return_dict=False)[0][0][:, 0]
                x = x + (following - sigma) * velocity
            pixels = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
            return ((pixels[0] + 1) / 2).clamp(0, 1).mul(255).round()

        expected, noise = image(SIGMAS), image(())
    found = torch.from_numpy(np.array(Image.open(drawn).convert("RGB"))).permute(2, 0, 1).float()
    pairs = {"stable-diffusion.cpp": found, "the noise, decoded": noise}
    print(f"diffusers: mean {expected.mean():.1f}, deviation {expected.std():.1f} (values of 0 to 255)")
    for name, each in pairs.items():
        difference, correlation = (
            (each - expected).abs().mean(),
            torch.corrcoef(torch.stack([each, expected]).flatten(1)),
        )
        print(f"{name}: mean absolute difference {difference:.2f}, correlation {correlation[0, 1]:.4f}")
    Image.fromarray(expected.permute(1, 2, 0).byte().numpy()).save(drawn.with_name(f"{drawn.stem}-diffusers.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing, comparing = commands.add_parser("draw"), commands.add_parser("compare")
    drawing.add_argument("export", type=Path, help="folder of fewstep export --to sd.cpp")
    drawing.add_argument("--out", type=Path, required=True)
    comparing.add_argument("model", type=Path, help="the folder that was exported")
    comparing.add_argument("drawn", type=Path)
    options = parser.parse_args()
    if options.command == "draw":
        draw(options.export, options.out)
    else:
        compare(options.model, options.drawn)


if __name__ == "__main__":
    main()
