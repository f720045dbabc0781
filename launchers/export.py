"""Export weights of a run to timm, to transformers, or for this program.

python launchers/export.py timm --checkpoint RUN_DIR [--weights momentum] [--output FOLDER]
python launchers/export.py hf --checkpoint RUN_DIR
python launchers/export.py onnx --checkpoint RUN_DIR
python launchers/export.py full --checkpoint RUN_DIR
python launchers/export.py encoder --checkpoint RUN_DIR [--output FILE]
"""

from cmtmae_scale.commands.export import export_weights

if __name__ == "__main__":
    raise SystemExit(export_weights())
