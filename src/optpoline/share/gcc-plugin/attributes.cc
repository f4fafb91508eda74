// SPDX-License-Identifier: Apache-2.0
// The attributes optpoline and no_optpoline, and which of them an indirect branch is under.
//
// They go on functions (for the calls inside), on types of functions and of pointers to them, on
// variables, parameters and struct fields that are called through or lie around what is, and on
// structs and classes (for calls through their fields, virtual ones too). Who is under several:
//
//   1. no_optpoline on the function that has the call: nothing in there is patched
//   2. what is nearest to the called expression: the field or variable, its type, the struct
//   3. optpoline on the function
//   4. the mode
//
// A local variable that says nothing is followed to what was assigned to it.

#include "site.h"
#include "stringpool.h"
#include "attribs.h"
#include "diagnostic-core.h"
#include "gimple-iterator.h"

static const int MOST_BRANCHES = 255; // one byte in a note
static const int MOST_STEPS = 12;     // from a called expression to where its value comes from

static const decision SILENT = { wish::NONE, 0 };

// Put an attribute where it can be found again: on a variant of a typedef's type.
static void
add_to_typedef (tree declaration, tree name, tree args)
{
  tree variant = build_variant_type_copy (TREE_TYPE (declaration));
  TYPE_ATTRIBUTES (variant) = tree_cons (name, args, TYPE_ATTRIBUTES (variant));
  TREE_TYPE (declaration) = variant;
}

static tree
handle_attribute (tree *node, tree name, tree args, int, bool *no_add_attrs)
{
  if (args)
    {
      tree count = TREE_VALUE (args);
      if (count && TREE_CODE (count) != IDENTIFIER_NODE)
	count = fold (count);
      if (!count || TREE_CODE (count) != INTEGER_CST || !tree_fits_shwi_p (count)
	  || tree_to_shwi (count) < 1 || tree_to_shwi (count) > MOST_BRANCHES)
	{
	  error ("the argument of attribute %qE is a number of branches from 1 to %d", name,
		 MOST_BRANCHES);
	  *no_add_attrs = true;
	  return NULL_TREE;
	}
      TREE_VALUE (args) = count;
    }
  switch (TREE_CODE (*node))
    {
    case FUNCTION_DECL:
    case VAR_DECL:
    case PARM_DECL:
    case FIELD_DECL:
      break;
    case TYPE_DECL:
      add_to_typedef (*node, name, args);
      *no_add_attrs = true;
      break;
    default:
      if (!TYPE_P (*node))
	{
	  warning (OPT_Wattributes, "%qE attribute ignored", name);
	  *no_add_attrs = true;
	}
    }
  return NULL_TREE;
}

void
register_attributes (void *, void *)
{
  static attribute_spec in = { "optpoline", 0, 1, false, false, false, false, handle_attribute, NULL };
  static attribute_spec out
    = { "no_optpoline", 0, 0, false, false, false, false, handle_attribute, NULL };
  register_attribute (&in);
  register_attribute (&out);
}

// What a list of attributes says.
static decision
read_attributes (tree list)
{
  if (lookup_attribute ("no_optpoline", list))
    return { wish::OUT, 0 };
  tree in = lookup_attribute ("optpoline", list);
  if (!in)
    return SILENT;
  tree args = TREE_VALUE (in);
  return { wish::IN, args ? (int) tree_to_shwi (TREE_VALUE (args)) : 0 };
}

// What a type says, or what it points to.
static decision
read_type (tree type)
{
  while (type && TYPE_P (type))
    {
      decision found = read_attributes (TYPE_ATTRIBUTES (type));
      if (found.what != wish::NONE)
	return found;
      // A class says it of itself, not of its variants.
      if (RECORD_OR_UNION_TYPE_P (type))
	return read_attributes (TYPE_ATTRIBUTES (TYPE_MAIN_VARIANT (type)));
      if (!POINTER_TYPE_P (type) && TREE_CODE (type) != ARRAY_TYPE)
	return SILENT;
      type = TREE_TYPE (type);
      if (RECORD_OR_UNION_TYPE_P (type))
	return SILENT; // a pointer to an object is not what is called
    }
  return SILENT;
}

static decision follow (tree value, tree function, int n_steps);

// What was assigned to a local variable says; whoever says no is heard.
static decision
follow_assignments (tree variable, tree function, int n_steps)
{
  decision result = SILENT;
  basic_block block;
  FOR_EACH_BB_FN (block, DECL_STRUCT_FUNCTION (function))
    for (gimple_stmt_iterator at = gsi_start_bb (block); !gsi_end_p (at); gsi_next (&at))
      {
	gimple *statement = gsi_stmt (at);
	if (!gimple_assign_single_p (statement) && !gimple_assign_cast_p (statement))
	  continue;
	if (gimple_assign_lhs (statement) != variable)
	  continue;
	decision found = follow (gimple_assign_rhs1 (statement), function, n_steps);
	if (found.what == wish::OUT)
	  return found;
	if (result.what == wish::NONE)
	  result = found;
      }
  return result;
}

// What an expression says whose value is called, nearest first.
static decision
follow (tree value, tree function, int n_steps)
{
  while (value && n_steps-- > 0)
    {
      decision found = SILENT;
      if (DECL_P (value))
	found = read_attributes (DECL_ATTRIBUTES (value));
      if (found.what == wish::NONE && TREE_TYPE (value))
	found = read_type (TREE_TYPE (value));
      if (found.what != wish::NONE)
	return found;
      switch (TREE_CODE (value))
	{
	case SSA_NAME:
	  {
	    gimple *made = SSA_NAME_DEF_STMT (value);
	    if (!made || (!gimple_assign_single_p (made) && !gimple_assign_cast_p (made)))
	      return SILENT;
	    value = gimple_assign_rhs1 (made);
	    break;
	  }
	case COMPONENT_REF:
	  {
	    tree field = TREE_OPERAND (value, 1);
	    found = read_attributes (DECL_ATTRIBUTES (field));
	    if (found.what == wish::NONE)
	      found = read_type (TREE_TYPE (field));
	    if (found.what == wish::NONE)
	      found = read_type (DECL_CONTEXT (field));
	    if (found.what != wish::NONE)
	      return found;
	    value = TREE_OPERAND (value, 0);
	    break;
	  }
	case OBJ_TYPE_REF:
	  if (virtual_method_call_p (value))
	    return read_type (obj_type_ref_class (value));
	  value = OBJ_TYPE_REF_EXPR (value);
	  break;
	case ARRAY_REF:
	case REALPART_EXPR:
	case IMAGPART_EXPR:
	case VIEW_CONVERT_EXPR:
	CASE_CONVERT:
	  value = TREE_OPERAND (value, 0);
	  break;
	case VAR_DECL:
	  // Only what is this function's own is followed; a static variable is set anywhere.
	  if (TREE_STATIC (value) || DECL_EXTERNAL (value) || TREE_ADDRESSABLE (value))
	    return SILENT;
	  return follow_assignments (value, function, n_steps);
	default:
	  return SILENT;
	}
    }
  return SILENT;
}

decision
decide_function (tree function)
{
  return read_attributes (DECL_ATTRIBUTES (function));
}

decision
decide_call (tree called, tree function)
{
  decision around = decide_function (function);
  if (around.what == wish::OUT)
    return around;
  decision found = follow (called, function, MOST_STEPS);
  return found.what == wish::NONE ? around : found;
}
