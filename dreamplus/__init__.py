import warnings

__version__ = "0.2.0"

# torch warns of this when fastai is imported; users of dreamplus can do nothing about it
warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)
