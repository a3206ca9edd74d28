"""Features of a folder of images, and the nearest neighbour of each: python extract_features.py FOLDER [MODEL]

MODEL is any name of weights: cim_vit_tiny, an id of `cim list`, hf-hub:org/name@revision, a release folder, a run.
"""

import sys
from pathlib import Path

from cim_models.evaluation import embed, load_features

folder, model = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "cim_vit_tiny"
embedded = embed(folder, model, Path("features.safetensors"))
features, paths = load_features(embedded.path)  # (N, D) and N paths, in the same order
features = features / features.norm(dim=1, keepdim=True)
similarities = (features @ features.T).fill_diagonal_(-1)
for path, nearest, similarity in zip(paths, similarities.argmax(dim=1), similarities.amax(dim=1), strict=True):
    print(f"{similarity:.3f}  {path}  {paths[nearest]}")
