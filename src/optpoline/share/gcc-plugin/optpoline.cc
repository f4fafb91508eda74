// SPDX-License-Identifier: Apache-2.0
// The plugin's entry: checks the compiler, reads the options, registers attributes and passes.
//
//   -fplugin=.../optpoline.so [-fplugin-arg-optpoline-mode=opt-out|opt-in]

#include <cstring>

#include "site.h"
#include "plugin-version.h"
#include "options.h"
#include "diagnostic-core.h"

int plugin_is_GPL_compatible;

plugin_options options;

static plugin_info information = {
  "1",
  "Marks every indirect branch so that a controller can find it and make it direct.\n"
  "  -fplugin-arg-optpoline-mode=opt-out  all may be patched but those marked no_optpoline\n"
  "  -fplugin-arg-optpoline-mode=opt-in   only those marked optpoline may be patched",
};

// Read the options; say what is wrong with them.
static bool
read_options (const plugin_name_args *name)
{
  for (int i = 0; i < name->argc; i++)
    {
      const plugin_argument &arg = name->argv[i];
      bool is_mode = !strcmp (arg.key, "mode") && arg.value;
      if (is_mode && !strcmp (arg.value, "opt-in"))
	options.opt_in = true;
      else if (is_mode && !strcmp (arg.value, "opt-out"))
	options.opt_in = false;
      else
	{
	  error ("optpoline: unknown option %<-fplugin-arg-%s-%s%s%s%>; there is "
		 "%<mode=opt-out%> and %<mode=opt-in%>",
		 name->base_name, arg.key, arg.value ? "=" : "", arg.value ? arg.value : "");
	  return false;
	}
    }
  return true;
}

// Say whether branches have a form that can be patched at all.
static bool
is_form_patchable ()
{
  // A retpoline written out in place has no branch that could lead elsewhere.
  if (global_options.x_ix86_indirect_branch != indirect_branch_thunk_inline)
    return true;
  error ("optpoline: %<-mindirect-branch=thunk-inline%> leaves nothing to patch; use "
	 "%<thunk%> or %<thunk-extern%>");
  return false;
}

static void
add_pass (const char *name, opt_pass *pass, const char *reference, pass_positioning_ops position)
{
  // 1: the first instance of the reference pass; there is one of each.
  register_pass_info info = { pass, reference, 1, position };
  register_callback (name, PLUGIN_PASS_MANAGER_SETUP, NULL, &info);
}

int
plugin_init (plugin_name_args *name, plugin_gcc_version *version)
{
  if (!plugin_default_version_check (version, &gcc_version))
    {
      error ("optpoline: the plugin was built for GCC %s (%s), and this is GCC %s (%s): build it "
	     "with %<optpoline plugin build%> for this compiler",
	     gcc_version.basever, gcc_version.datestamp, version->basever, version->datestamp);
      return 1;
    }
  if (!read_options (name) || !is_form_patchable ())
    return 1;
  register_callback (name->base_name, PLUGIN_INFO, NULL, &information);
  register_callback (name->base_name, PLUGIN_ATTRIBUTES, register_attributes, NULL);
  // Behind "cfg" functions are still as their language made them, and nothing is inlined.
  add_pass (name->base_name, make_tag_pass (g), "cfg", PASS_POS_INSERT_AFTER);
  // The last pass on statements, and the first on instructions: "expand" is between them.
  add_pass (name->base_name, make_before_expand_pass (g), "*warn_function_noreturn",
	    PASS_POS_INSERT_AFTER);
  add_pass (name->base_name, make_after_expand_pass (g), "vregs", PASS_POS_INSERT_BEFORE);
  add_pass (name->base_name, make_dead_pass (g), "*free_cfg", PASS_POS_INSERT_BEFORE);
  // Before "final" nothing can come between a mark and its call any more.
  add_pass (name->base_name, make_mark_pass (g), "final", PASS_POS_INSERT_BEFORE);
  register_callback (name->base_name, PLUGIN_FINISH_UNIT, write_strings, NULL);
  return 0;
}
