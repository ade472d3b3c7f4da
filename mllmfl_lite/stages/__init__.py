"""The paper's stages on the server: annotate, pretrain, align."""
