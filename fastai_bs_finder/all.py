"Everything, with one import: `from fastai_bs_finder.all import *`"
from .stats import *
from .gradients import *
from .recorder import *
from .state import *
from .finder import *
