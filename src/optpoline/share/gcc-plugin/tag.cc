// SPDX-License-Identifier: Apache-2.0
// The first pass: what each indirect call is under, and its type, while both can still be seen.
//
// Later, fields have become offsets, variables are gone, and link-time optimisation has forgotten
// how its types are written. So both are kept in an attribute of the call's own function type.
// Its name has a space, so that no program can write it; the compiler itself ignores it.

#include <map>

#include "site.h"
#include "stringpool.h"
#include "attribs.h"
#include "diagnostic.h"
#include "gimple-iterator.h"

static const char TAG[] = "optpoline call";

// What follows is compiled by a compiler that checks formats for a language it does not know.
#pragma GCC diagnostic ignored "-Wformat"
#pragma GCC diagnostic ignored "-Wformat-extra-args"

// Write a type as the compiler does in its messages.
static std::string
write_type (tree type)
{
  pretty_printer *printer = global_dc->printer->clone ();
  pp_show_color (printer) = false;
  pp_set_line_maximum_length (printer, 0);
  pp_printf (printer, "%T", TYPE_MAIN_VARIANT (type));
  std::string text;
  for (const char *letter = pp_formatted_text (printer); *letter; letter++)
    if (*letter != ' ' || letter[1] != ' ') // between parameters there may be two
      text += *letter;
  delete printer;
  // As it is written in the source; messages add what its names stand for.
  size_t explained = text.find (" {aka ");
  if (explained != std::string::npos)
    text.resize (explained);
  return text;
}

static bool
is_indirect (const gcall *call)
{
  return !gimple_call_internal_p (call) && !gimple_call_fndecl (call) && gimple_call_fn (call)
	 && gimple_call_fntype (call);
}

// Return a variant of a function type that carries what is known of a call.
static tree
build_tagged_type (tree type, decision choice)
{
  std::string text = write_type (type);
  // Two numbers and a string: what lookup needs to make a site_tag again.
  tree args = tree_cons (NULL_TREE, build_string (text.size () + 1, text.c_str ()), NULL_TREE);
  args = tree_cons (NULL_TREE, build_int_cst (integer_type_node, choice.n_branches), args);
  args = tree_cons (NULL_TREE, build_int_cst (integer_type_node, (int) choice.what), args);
  tree variant = build_variant_type_copy (type);
  TYPE_ATTRIBUTES (variant) = tree_cons (get_identifier (TAG), args, TYPE_ATTRIBUTES (variant));
  return variant;
}

bool
read_tag (const gcall *call, site_tag *tag)
{
  if (!is_indirect (call))
    return false;
  tree found = lookup_attribute (TAG, TYPE_ATTRIBUTES (gimple_call_fntype (call)));
  if (!found)
    return false;
  tree what = TREE_VALUE (found);
  tree n_branches = TREE_CHAIN (what);
  tag->choice.what = (wish) tree_to_shwi (TREE_VALUE (what));
  tag->choice.n_branches = tree_to_shwi (TREE_VALUE (n_branches));
  tag->type = TREE_STRING_POINTER (TREE_VALUE (TREE_CHAIN (n_branches)));
  return true;
}

static const pass_data tag_data = { GIMPLE_PASS, "optpoline_tag", OPTGROUP_NONE, TV_PLUGIN_RUN,
				    PROP_cfg, 0, 0, 0, 0 };

class tag_pass : public gimple_opt_pass
{
public:
  tag_pass (gcc::context *ctxt) : gimple_opt_pass (tag_data, ctxt) {}

  unsigned int execute (function *) override;
};

unsigned int
tag_pass::execute (function *fun)
{
  // Only for this function: types may be collected between passes.
  std::map<std::pair<tree, std::pair<wish, int> >, tree> tagged;
  basic_block block;
  FOR_EACH_BB_FN (block, fun)
    for (gimple_stmt_iterator at = gsi_start_bb (block); !gsi_end_p (at); gsi_next (&at))
      {
	gcall *call = dyn_cast<gcall *> (gsi_stmt (at));
	if (!call || !is_indirect (call))
	  continue;
	tree type = gimple_call_fntype (call);
	if (lookup_attribute (TAG, TYPE_ATTRIBUTES (type)))
	  continue; // of a body that was made from one that has been here
	decision choice = decide_call (gimple_call_fn (call), fun->decl);
	tree &variant = tagged[{ type, { choice.what, choice.n_branches } }];
	if (!variant)
	  variant = build_tagged_type (type, choice);
	gimple_call_set_fntype (call, variant);
      }
  return 0;
}

opt_pass *
make_tag_pass (gcc::context *ctxt)
{
  return new tag_pass (ctxt);
}
