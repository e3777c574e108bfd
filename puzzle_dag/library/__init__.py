"""The pieces that children are built from: cached activations, initialisations and block-wise local distillation."""
