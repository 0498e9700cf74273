"What a notebook needs, with one import: `from fastai_bs_finder.all import *`"
from fastai_bs_finder.finder import BSFinder, EndSearch # and with it the methods of learners, recorders and loaders
from fastai_bs_finder.lr import scale_lr
from fastai_bs_finder.monitor import NoiseScaleMonitor
from fastai_bs_finder.schedule import BatchSizeSchedule
from fastai_bs_finder.state import preserve
from fastai_bs_finder.study import Study, bs_study
from fastai_bs_finder.suggest import BSSuggestion

__all__ = ['BSFinder', 'BSSuggestion', 'BatchSizeSchedule', 'EndSearch', 'NoiseScaleMonitor', 'Study', 'bs_study', 'preserve', 'scale_lr']
