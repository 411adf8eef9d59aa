"""postgrad: published methods of policy optimisation and contrastive learning, side by side."""

__version__ = "0.1.0"
