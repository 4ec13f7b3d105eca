"""How long the products of a model take on this machine: `mlxq bench --kernels`."""
