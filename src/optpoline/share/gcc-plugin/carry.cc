// SPDX-License-Identifier: Apache-2.0
// Two passes around the step from statements to instructions: what was known of a call is carried
// over, and then kept in the call instruction.
//
// Across the step the place in the source tells which instruction is which call's. Where two
// different calls share one place (of one macro, at link time), the more careful wish holds for
// both. Behind it a call has `(use (const_int N))` in its register usage, N naming the tag. Passes
// hand the usage on whenever they copy, split, combine or replace a call, and two calls whose
// usage differs are never merged: each site keeps one type and one wish.

#include <map>
#include <vector>

#include "site.h"
#include "rtl.h"
#include "memmodel.h"
#include "emit-rtl.h"
#include "gimple-iterator.h"

// A tag's number is its index and this, so that no other use of a constant is taken for one.
static const HOST_WIDE_INT FIRST_TAG = 0x6f707400;

static std::vector<site_tag> tags; // of this compilation
static std::map<location_t, site_tag> by_place; // of the function that is being expanded

static int
find_tag (const site_tag &tag)
{
  for (size_t i = 0; i < tags.size (); i++)
    if (tags[i].choice == tag.choice && tags[i].type == tag.type)
      return i;
  tags.push_back (tag);
  return tags.size () - 1;
}

static site_tag
merge (const site_tag &one, const site_tag &other)
{
  site_tag result = one;
  if (one.type != other.type)
    result.type.clear ();
  if (one.choice == other.choice)
    return result;
  if (one.choice.what == wish::OUT || other.choice.what == wish::OUT)
    result.choice = { wish::OUT, 0 };
  else
    result.choice = { wish::NONE, 0 };
  return result;
}

static const pass_data before_data = { GIMPLE_PASS, "optpoline_before_expand", OPTGROUP_NONE,
				       TV_PLUGIN_RUN, PROP_cfg, 0, 0, 0, 0 };

class before_expand_pass : public gimple_opt_pass
{
public:
  before_expand_pass (gcc::context *ctxt) : gimple_opt_pass (before_data, ctxt) {}

  unsigned int execute (function *) override;
};

unsigned int
before_expand_pass::execute (function *fun)
{
  by_place.clear ();
  basic_block block;
  FOR_EACH_BB_FN (block, fun)
    for (gimple_stmt_iterator at = gsi_start_bb (block); !gsi_end_p (at); gsi_next (&at))
      {
	site_tag tag;
	gcall *call = dyn_cast<gcall *> (gsi_stmt (at));
	if (!call || !read_tag (call, &tag))
	  continue;
	auto added = by_place.insert ({ gimple_location (call), tag });
	if (!added.second)
	  added.first->second = merge (added.first->second, tag);
      }
  return 0;
}

static const pass_data after_data = { RTL_PASS, "optpoline_after_expand", OPTGROUP_NONE,
				      TV_PLUGIN_RUN, 0, 0, 0, 0, 0 };

class after_expand_pass : public rtl_opt_pass
{
public:
  after_expand_pass (gcc::context *ctxt) : rtl_opt_pass (after_data, ctxt) {}

  unsigned int execute (function *) override;
};

unsigned int
after_expand_pass::execute (function *)
{
  for (rtx_insn *insn = get_insns (); insn; insn = NEXT_INSN (insn))
    {
      rtx call = CALL_P (insn) ? get_call_rtx_from (insn) : NULL_RTX;
      if (!call || CONSTANT_P (XEXP (XEXP (call, 0), 0)))
	continue;
      auto found = by_place.find (INSN_LOCATION (insn));
      if (found == by_place.end ())
	continue;
      rtx number = gen_int_mode (FIRST_TAG + find_tag (found->second), SImode);
      rtx use = gen_rtx_USE (VOIDmode, number);
      CALL_INSN_FUNCTION_USAGE (insn)
	= gen_rtx_EXPR_LIST (VOIDmode, use, CALL_INSN_FUNCTION_USAGE (insn));
    }
  by_place.clear ();
  return 0;
}

bool
carried_tag (const rtx_insn *call, site_tag *tag)
{
  for (rtx link = CALL_INSN_FUNCTION_USAGE (call); link; link = XEXP (link, 1))
    {
      if (GET_CODE (XEXP (link, 0)) != USE || !CONST_INT_P (XEXP (XEXP (link, 0), 0)))
	continue;
      HOST_WIDE_INT number = INTVAL (XEXP (XEXP (link, 0), 0)) - FIRST_TAG;
      if (number < 0 || number >= (HOST_WIDE_INT) tags.size ())
	continue;
      *tag = tags[number];
      return true;
    }
  return false;
}

opt_pass *
make_before_expand_pass (gcc::context *ctxt)
{
  return new before_expand_pass (ctxt);
}

opt_pass *
make_after_expand_pass (gcc::context *ctxt)
{
  return new after_expand_pass (ctxt);
}
