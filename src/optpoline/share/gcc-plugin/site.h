// SPDX-License-Identifier: Apache-2.0
// What the passes of the plugin tell each other about one indirect branch.
//
//   tag    (before anything is optimised)   called expression -> Decision, type
//            carried as an attribute of the call's function type: it survives inlining, cloning, LTO
//   carry  (around the step to RTL)         statement -> instruction
//            carried as a USE in the call's register usage: it survives all passes on instructions
//   dead   (while the flow is still known)  instruction -> a register that is dead there
//   mark   (just before assembly is written) instruction -> label, padding, note

#ifndef OPTPOLINE_SITE_H
#define OPTPOLINE_SITE_H

#include <string>

#include "gcc-plugin.h"
// These come after gcc-plugin.h, which sets up the host's configuration.
#include "tree.h"
#include "gimple.h"
#include "tree-pass.h"
#include "context.h"

// What its programmer wants of a site.
enum class wish
{
  NONE, // said nothing: the mode decides
  IN,
  OUT
};

struct decision
{
  wish what;
  int n_branches; // most branches that its block may have; 0: as many as pay

  bool operator== (const decision &other) const
  {
    return what == other.what && n_branches == other.n_branches;
  }
};

struct site_tag
{
  decision choice;
  std::string type; // of what is called, as its language writes it; "" where it is not known
};

struct plugin_options
{
  bool opt_in; // only what is asked for may be patched
};

extern plugin_options options;

// attributes.cc
void register_attributes (void *gcc_data, void *user_data);
decision decide_call (tree called, tree function);
decision decide_function (tree function);

// tag.cc
opt_pass *make_tag_pass (gcc::context *ctxt);
bool read_tag (const gcall *call, site_tag *tag);

// carry.cc
opt_pass *make_before_expand_pass (gcc::context *ctxt);
opt_pass *make_after_expand_pass (gcc::context *ctxt);
bool carried_tag (const rtx_insn *call, site_tag *tag);

// dead.cc
opt_pass *make_dead_pass (gcc::context *ctxt);
const char *find_dead_name (const rtx_insn *insn); // NULL if none is known, or needed

// mark.cc
opt_pass *make_mark_pass (gcc::context *ctxt);
void write_strings (void *gcc_data, void *user_data);

#endif
