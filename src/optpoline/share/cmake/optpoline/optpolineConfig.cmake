# SPDX-License-Identifier: Apache-2.0
# find_package(optpoline [COMPONENTS thunks plugin]) defines, to be linked like libraries:
#
#   optpoline::optpoline   the header
#   optpoline::thunks      indirect branches are retpolines, through thunks of ours
#   optpoline::plugin      the GCC plugin marks indirect branches. Only if asked for as a component:
#                          it is built now, unless it is there, by the command `optpoline`
#
# The latter two bring the header along, and go together. A target's property OPTPOLINE_MODE
# (opt-out, opt-in) says which of its branches the plugin lets a controller change.
# OPTPOLINE_COMMAND is the command; without it, that of this Python environment, else of PATH.

# COMPILE_LANG_AND_ID is as old as that.
if(CMAKE_VERSION VERSION_LESS 3.15)
    set(optpoline_FOUND FALSE)
    set(optpoline_NOT_FOUND_MESSAGE "optpoline needs CMake 3.15 or newer")
    return()
endif()
# Whatever the project has set; it holds in this file only.
cmake_policy(VERSION 3.15)

get_filename_component(optpoline_share_ "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)

if(NOT TARGET optpoline::optpoline)
    add_library(optpoline::optpoline INTERFACE IMPORTED)
    set_target_properties(optpoline::optpoline PROPERTIES
        INTERFACE_INCLUDE_DIRECTORIES "${optpoline_share_}/include")
endif()

if(NOT TARGET optpoline::thunks)
    add_library(optpoline::thunks INTERFACE IMPORTED)
    set(optpoline_gnu_ "$<OR:$<COMPILE_LANG_AND_ID:C,GNU>,$<COMPILE_LANG_AND_ID:CXX,GNU>>")
    set(optpoline_clang_ "$<OR:$<COMPILE_LANG_AND_ID:C,Clang>,$<COMPILE_LANG_AND_ID:CXX,Clang>>")
    # GCC rejects retpolines together with -fcf-protection=full, the default of some distributions.
    # The thunks are linked as a file, which the compiler compiles then: no project has to enable
    # assembly, and a static library hands them on to what it becomes part of.
    set_target_properties(optpoline::thunks PROPERTIES
        INTERFACE_COMPILE_OPTIONS "$<${optpoline_gnu_}:-mindirect-branch=thunk-extern;-mindirect-branch-register;-fcf-protection=none>;$<${optpoline_clang_}:-mretpoline;-mretpoline-external-thunk;-fcf-protection=none>"
        INTERFACE_LINK_LIBRARIES "optpoline::optpoline;${optpoline_share_}/thunks/optpoline_thunks.S")
    unset(optpoline_gnu_)
    unset(optpoline_clang_)
endif()
set(optpoline_thunks_FOUND TRUE)

# Ask the command for the plugin of this project's compiler; leave its path in `path`, or what was
# wrong in `error`. A function, so that its variables stay its own.
function(optpoline_build_plugin_ path error)
    set(${path} "" PARENT_SCOPE)
    if(CMAKE_C_COMPILER_LOADED)
        set(compiler "${CMAKE_C_COMPILER}")
    elseif(CMAKE_CXX_COMPILER_LOADED)
        set(compiler "${CMAKE_CXX_COMPILER}")
    else()
        set(${error} "the plugin needs a project of C or C++" PARENT_SCOPE)
        return()
    endif()
    # ENVIRONMENT/lib/pythonX.Y/site-packages/optpoline/share
    find_program(OPTPOLINE_COMMAND optpoline
        HINTS "${optpoline_share_}/../../../../../bin" DOC "The command optpoline")
    if(NOT OPTPOLINE_COMMAND)
        set(${error} "there is no command optpoline; set OPTPOLINE_COMMAND" PARENT_SCOPE)
        return()
    endif()
    execute_process(COMMAND ${OPTPOLINE_COMMAND} plugin build --cc "'${compiler}'"
        RESULT_VARIABLE status OUTPUT_VARIABLE built ERROR_VARIABLE said
        OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
    if(status EQUAL 0)
        set(${path} "${built}" PARENT_SCOPE)
    else()
        set(${error} "${OPTPOLINE_COMMAND} plugin build: ${status}\n${said}" PARENT_SCOPE)
    endif()
endfunction()

if("plugin" IN_LIST optpoline_FIND_COMPONENTS AND NOT TARGET optpoline::plugin)
    optpoline_build_plugin_(optpoline_plugin_ optpoline_error_)
    if(optpoline_plugin_)
        set(optpoline_mode_ "$<TARGET_PROPERTY:OPTPOLINE_MODE>")
        set(optpoline_flags_ "-fplugin=${optpoline_plugin_};$<$<BOOL:${optpoline_mode_}>:-fplugin-arg-optpoline-mode=${optpoline_mode_}>")
        add_library(optpoline::plugin INTERFACE IMPORTED)
        # With -flto code is made at link time; otherwise the linker's driver ignores the plugin.
        set_target_properties(optpoline::plugin PROPERTIES
            INTERFACE_COMPILE_OPTIONS "$<$<OR:$<COMPILE_LANGUAGE:C>,$<COMPILE_LANGUAGE:CXX>>:${optpoline_flags_}>"
            INTERFACE_LINK_OPTIONS "${optpoline_flags_}"
            INTERFACE_LINK_LIBRARIES optpoline::optpoline)
        unset(optpoline_mode_)
        unset(optpoline_flags_)
    else()
        set(optpoline_NOT_FOUND_MESSAGE "${optpoline_error_}")
    endif()
    unset(optpoline_plugin_)
    unset(optpoline_error_)
endif()
if(TARGET optpoline::plugin)
    set(optpoline_plugin_FOUND TRUE)
endif()
unset(optpoline_share_)

foreach(optpoline_component_ IN LISTS optpoline_FIND_COMPONENTS)
    if(NOT optpoline_${optpoline_component_}_FOUND
            AND optpoline_FIND_REQUIRED_${optpoline_component_})
        set(optpoline_FOUND FALSE)
        if(NOT optpoline_NOT_FOUND_MESSAGE)
            set(optpoline_NOT_FOUND_MESSAGE "there is no component ${optpoline_component_}")
        endif()
    endif()
endforeach()
unset(optpoline_component_)
