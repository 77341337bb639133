"""MLX's affine layout, for mlx-lm on Apple's machines."""
