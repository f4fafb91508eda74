# SPDX-License-Identifier: Apache-2.0
"""Find the retpoline sites of a module, in a process or in a file."""

from optpoline.discover.declarations import Declarations
from optpoline.discover.declared import read_declarations
from optpoline.discover.flags import flags_dead_at
from optpoline.discover.image import ModuleImage
from optpoline.discover.nearby import find_call_sites, find_dynamic_sites
from optpoline.discover.operand import operand_dead_at
from optpoline.discover.sites import SiteScan, count_plain_indirect, find_sites
from optpoline.discover.symbols import SymbolTable

__all__ = [
    "Declarations",
    "ModuleImage",
    "SiteScan",
    "SymbolTable",
    "count_plain_indirect",
    "find_call_sites",
    "find_dynamic_sites",
    "find_sites",
    "flags_dead_at",
    "operand_dead_at",
    "read_declarations",
]
