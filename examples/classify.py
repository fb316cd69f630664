"""Classify .npy cutouts without torch: python classify.py MODEL.onnx FILE.npy ..."""

import json
import sys

import numpy as np
import onnxruntime

model, *files = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
class_names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
for file in files:
    image = np.load(file).astype(np.float32)  # (64, 64), raw pixels
    (probabilities,) = session.run(["probabilities"], {"images": image[None, None]})
    values = " ".join(f"{n}={p:.6f}" for n, p in zip(class_names, probabilities[0], strict=True))
    print(file, class_names[int(probabilities[0].argmax())], values)
