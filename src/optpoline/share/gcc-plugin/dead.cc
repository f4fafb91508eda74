// SPDX-License-Identifier: Apache-2.0
// Which register is dead at a branch whose target is in memory, and wherever it leads.
//
// Who puts a direct branch in its place has to compare the target with others, so it loads it into
// a register first, which must be one that nobody needs: not the code behind a call or at a label,
// not the callee. The last is what the calling convention says: a register that it lets the callee
// overwrite, and that this call does not use to hand something over. Who calls a function of the same
// unit may know better which registers it leaves alone (-fipa-ra); so for a goto it must be one that
// the function writes somewhere. A call counts as writing all that its callee may.
//
// The flow of control is known up to "*free_cfg"; passes behind that move instructions at most, and
// make no register live that was dead. A branch that one of them made anew has no promise.

#include <map>

#include "site.h"
#include "rtl.h"
#include "memmodel.h"
#include "hard-reg-set.h"
#include "regs.h"
#include "bitmap.h"
#include "basic-block.h"
#include "cfgrtl.h"
#include "df.h"
#include "emit-rtl.h"
#include "function-abi.h"
#include "regset.h"

static std::map<int, int> dead_by_uid; // of the function that is being compiled

// Say whether a call or computed goto reads its target from memory.
static bool
is_through_memory (const rtx_insn *insn)
{
  if (CALL_P (insn))
    {
      rtx call = get_call_rtx_from (insn);
      return call && MEM_P (XEXP (XEXP (call, 0), 0));
    }
  // A goto out of the function goes by rules of its own.
  if (!JUMP_P (insn) || !computed_jump_p (insn) || find_reg_note (insn, REG_NON_LOCAL_GOTO, NULL_RTX))
    return false;
  rtx set = pc_set (insn);
  return set && MEM_P (SET_SRC (set));
}

// Say whether a branch needs a register for more than to find its target.
static bool
is_handed_over (rtx_insn *insn, unsigned int regno)
{
  df_ref use;
  FOR_EACH_INSN_USE (use, insn)
    if (DF_REF_REGNO (use) == regno && DF_REF_TYPE (use) != DF_REF_REG_MEM_LOAD)
      return true;
  return CALL_P (insn) && find_regno_fusage (insn, USE, regno);
}

// Return the registers that a function writes, or may by what it calls.
static HARD_REG_SET
find_written (function *fun)
{
  HARD_REG_SET written;
  CLEAR_HARD_REG_SET (written);
  basic_block block;
  rtx_insn *insn;
  df_ref definition;
  FOR_EACH_BB_FN (block, fun)
    FOR_BB_INSNS (block, insn)
      if (NONDEBUG_INSN_P (insn))
	FOR_EACH_INSN_DEF (definition, insn)
	  SET_HARD_REG_BIT (written, DF_REF_REGNO (definition));
  return written;
}

// Return a register that nobody needs; -1 if there is none.
static int
find_dead_register (rtx_insn *insn, const_bitmap live_behind, const HARD_REG_SET &written)
{
  function_abi abi = CALL_P (insn) ? insn_callee_abi (insn) : function_abi (*crtl->abi);
  for (int regno = FIRST_PSEUDO_REGISTER - 1; regno >= 0; regno--)
    if (TEST_HARD_REG_BIT (reg_class_contents[GENERAL_REGS], regno) && !fixed_regs[regno]
	&& !global_regs[regno] && abi.clobbers_full_reg_p (regno)
	&& TEST_HARD_REG_BIT (written, regno)
	&& !bitmap_bit_p (live_behind, regno) && !is_handed_over (insn, regno))
      return regno;
  return -1;
}

static const pass_data dead_data = { RTL_PASS, "optpoline_dead", OPTGROUP_NONE, TV_PLUGIN_RUN,
				     PROP_cfg, 0, 0, 0, 0 };

class dead_pass : public rtl_opt_pass
{
public:
  dead_pass (gcc::context *ctxt) : rtl_opt_pass (dead_data, ctxt) {}

  unsigned int execute (function *) override;
};

unsigned int
dead_pass::execute (function *fun)
{
  dead_by_uid.clear ();
  // Where a load that faults is an exception of the language, it must fault where it is.
  if (fun->can_throw_non_call_exceptions)
    return 0;
  df_analyze ();
  HARD_REG_SET written = find_written (fun);
  auto_bitmap live;
  basic_block block;
  FOR_EACH_BB_FN (block, fun)
    {
      rtx_insn *insn;
      bitmap_copy (live, DF_LR_OUT (block));
      df_simulate_initialize_backwards (block, live);
      FOR_BB_INSNS_REVERSE (block, insn)
	{
	  if (!NONDEBUG_INSN_P (insn))
	    continue;
	  if (is_through_memory (insn))
	    dead_by_uid[INSN_UID (insn)] = find_dead_register (insn, live, written);
	  df_simulate_one_insn_backwards (block, insn, live);
	}
    }
  return 0;
}

const char *
find_dead_name (const rtx_insn *insn)
{
  auto found = dead_by_uid.find (INSN_UID (insn));
  if (found == dead_by_uid.end () || found->second < 0 || !is_through_memory (insn))
    return NULL;
  return reg_names[found->second];
}

opt_pass *
make_dead_pass (gcc::context *ctxt)
{
  return new dead_pass (ctxt);
}
