"Everything, with one import: `from fastai_bs_finder.all import *`"
from .stats import *
from .gradients import *
from .recorder import *
from .state import *
from .loaders import *
from .profile import *
from .suggest import *
from .finder import *
