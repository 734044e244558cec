compiler: str
torch_version: str
cuda_archs: str
